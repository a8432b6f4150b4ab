"""Archives and checkpoints that somebody made to do harm: what torch would run of them is not reached."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qsearch.errors import UnsupportedModelError
from qsearch.models.archive_check import check_program
from qsearch.models.checkpoint import read_state
from qsearch.models.exported_program import load_exported_program

MODEL = "models/model.json"
CONSTANTS = "data/constants/model_constants_config.json"
HARM = "__import__('pathlib').Path('harmed').touch()"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def members() -> dict[str, bytes]:
    """A network's archive, a batch of any size, by the members' names."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).eval()
    program = torch.export.export(network, (torch.zeros(2, 1, 4, 4),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    stream = io.BytesIO()
    torch.export.save(program, stream, extra_files={"classes.json": '["a", "b"]'})
    with zipfile.ZipFile(stream) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def write(members: dict[str, bytes], changes: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile("bad.pt2", "w", method) as archive:
        for name, content in (members | changes).items():
            archive.writestr(f"bad/{name}", content)
    return Path("bad.pt2")


def test_what_nobody_changed_is_read(members: dict[str, bytes]) -> None:
    found = load_exported_program(write(members, {}))
    assert found.shape == (1, 4, 4) and found.classes == ("a", "b")
    with torch.no_grad():
        assert found.program.module()(torch.zeros(3, 1, 4, 4)).shape == (3, 2)


class WithoutGradients(nn.Module):
    """Holds a graph within its graph."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            inner = images.relu()
        return inner.flatten(1)


def test_a_network_that_switches_gradients_off_is_read() -> None:
    torch.export.save(torch.export.export(WithoutGradients(), (torch.zeros(1, 1, 2, 2),)), "good.pt2")
    assert "wrap_with_set_grad_enabled" in str(load_exported_program(Path("good.pt2")).program.graph)


class Payload:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, (HARM,))


def _tensor(document: dict[str, Any]) -> dict[str, Any]:
    return next(iter(document["graph_module"]["graph"]["tensor_values"].values()))


def _node(document: dict[str, Any]) -> dict[str, Any]:
    return document["graph_module"]["graph"]["nodes"][0]


def _signature(document: dict[str, Any]) -> dict[str, Any]:
    return document["graph_module"]["module_call_graph"][0]["signature"]


def _formula(text: str) -> Callable[[dict[str, Any]], object]:
    def change(document: dict[str, Any]) -> None:
        _tensor(document)["sizes"][0] = {"as_expr": {"expr_str": text, "hint": {"as_int": 2}}}

    return change


def _tree(kind: str | None, context: Any) -> Callable[[dict[str, Any]], object]:
    return lambda document: _signature(document).update(
        in_spec=json.dumps([1, {"type": kind, "context": json.dumps(context), "children_spec": []}])
    )


def _graph(target: str, name: str = "g") -> dict[str, Any]:
    graph = {"nodes": [{"target": target, "inputs": [], "metadata": {}}]}
    return {"name": "a", "arg": {"as_graph": {"name": name, "graph": graph}}}


def _argument(made: dict[str, Any]) -> Callable[[dict[str, Any]], object]:
    return lambda document: _node(document)["inputs"].append(made)


def _rename(document: dict[str, Any]) -> None:
    graph = document["graph_module"]["graph"]
    old, new = "conv2d", f"conv2d = 1; {HARM}; conv2d"
    document["graph_module"]["graph"] = json.loads(json.dumps(graph).replace(f'"{old}"', json.dumps(new)))


ENUM = {"__enum__": True, "fqn": "harm:Harm", "name": "a"}
DOCUMENTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "formula": (_formula(HARM), "is no formula"),
    "formula of a call": (_formula("Symbol('s0').func.__class__"), "is no formula"),
    "formula with a lambda": (_formula("(lambda: 1)()"), "is no formula"),
    "formula as text": (_formula("Integer('1')"), "is no formula"),
    "symbol": (_formula("Symbol('s0; import os')"), "is no formula"),
    "tower": (_formula("Pow(Integer(10), Integer(999999999))"), "is no formula"),
    "operator": (lambda document: _node(document).update(target="torch.os.system"), "no operator of ATen"),
    "operator of Python": (lambda document: _node(document).update(target="_operator.methodcaller"), "no operator of ATen"),
    "operator on files": (
        lambda document: _node(document).update(target="torch.ops.aten.from_file.default"),
        "no operator of ATen",
    ),
    "unknown operator": (lambda document: _node(document).update(target="torch.ops.harm.full.default"), "no operator of ATen"),
    "operator as argument": (_argument({"name": "a", "arg": {"as_operator": "math.x"}}), "no operator of ATen"),
    "graph within a graph": (_argument(_graph("torch.os.system")), "no operator of ATen"),
    "name of a graph": (_argument(_graph("torch.ops.aten.relu.default", HARM)), "is not a name"),
    "name": (_rename, "is not a name"),
    "argument": (lambda document: _node(document)["inputs"][0].update(name=f"x={HARM}"), "is not a name"),
    "names of arguments": (lambda document: _signature(document).update(forward_arg_names=[HARM]), "is not a name"),
    "parameter": (
        lambda document: document["graph_module"]["signature"]["input_specs"][0]["parameter"].update(
            parameter_name=f'a"+{HARM}+"'
        ),
        "is not a name",
    ),
    "tree with an enumeration": (_tree("builtins.dict", [ENUM]), "is not a name"),
    "tree that is an enumeration": (_tree("builtins.dict", ENUM), "tree specification"),
    "type of a user's own": (
        lambda document: document["graph_module"].update(treespec_namedtuple_fields={"harm": 1}),
        "no part of",
    ),
    "formula with a line break": (_formula("Symbol('s\\\n1')"), "is no formula"),
    "tree of another type": (_tree("collections.defaultdict", {"default_factory_module": "harm"}), "tree specification"),
    "tree with a context": (_tree("builtins.tuple", ENUM), "tree specification"),
    "keys that are code": (_tree("builtins.dict", [f"a={HARM}"]), "is not a name"),
    "depth": (lambda document: document.update(x=json.loads("[" * 500 + "]" * 500)), "deep"),
}


@pytest.mark.parametrize("what", DOCUMENTS)
def test_documents_that_would_run_code(members: dict[str, bytes], folder: Path, what: str) -> None:
    (folder / "harm.py").write_text("import pathlib; pathlib.Path('harmed').touch()")
    change, words = DOCUMENTS[what]
    document = json.loads(members[MODEL])
    check_program(json.dumps(document))
    change(document)
    with pytest.raises(UnsupportedModelError, match=words):
        load_exported_program(write(members, {MODEL: json.dumps(document).encode()}))
    assert not (folder / "harmed").exists()


def test_conditions_are_dropped(members: dict[str, bytes], folder: Path) -> None:
    document = json.loads(members[MODEL])
    document["guards_code"] = [HARM]
    program = load_exported_program(write(members, {MODEL: json.dumps(document).encode()})).program
    program.module()(torch.zeros(2, 1, 4, 4))
    assert not (folder / "harmed").exists()


def _config(path_name: str, use_pickle: bool = True, sizes: tuple[int, ...] = (1,)) -> bytes:
    meta = {
        "dtype": 7,
        "sizes": [{"as_int": size} for size in sizes],
        "requires_grad": False,
        "device": {"type": "cpu", "index": None},
    }
    meta |= {"strides": [{"as_int": 0} for _ in sizes], "storage_offset": {"as_int": 0}, "layout": 7}
    row = {"path_name": path_name, "is_param": False, "use_pickle": use_pickle, "tensor_meta": meta}
    return json.dumps({"config": {"a": row}}).encode()


def _pickled(save: Callable[[Any], bytes]) -> bytes:
    return save(Payload())


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


MEMBERS: dict[str, tuple[dict[str, bytes], str]] = {
    "pickled object": (
        {"data/constants/opaque_obj_0": pickle.dumps(Payload()), CONSTANTS: _config("opaque_obj_0")},
        "no part of",
    ),
    "pickled object by a tensor's name": (
        {"data/constants/tensor_0": _saved(Payload()), CONSTANTS: _config("tensor_0")},
        "weights_only|Unpickling",
    ),
    "way out": ({CONSTANTS: _config("../../extra/opaque_obj_0")}, "file of a tensor"),
    "example": ({"data/sample_inputs/model.pt": _saved(Payload())}, "cannot be loaded"),
    "library": ({"data/aotinductor/model/harm.so": b"code"}, "no part of"),
    "older weights": ({"data/weights/model.pt": _saved(Payload())}, "no part of"),
    "endless tensor": (
        {CONSTANTS: _config("tensor_0", False, (10**6, 10**6)), "data/constants/tensor_0": bytes(8)},
        "more than the file",
    ),
    "second program": ({"models/other.json": b"{}"}, "no part of"),
}


@pytest.mark.parametrize("what", MEMBERS)
def test_members_that_would_run_code(members: dict[str, bytes], folder: Path, what: str) -> None:
    changes, words = MEMBERS[what]
    with pytest.raises(UnsupportedModelError, match=words):
        load_exported_program(write(members, changes))
    assert not (folder / "harmed").exists()


def test_bombs(members: dict[str, bytes]) -> None:
    with pytest.raises(UnsupportedModelError, match="unpacks to"):
        load_exported_program(write(members, {"extra/zeros": bytes(1 << 22)}, zipfile.ZIP_DEFLATED))
    torch.save({"a": torch.zeros(1 << 20)}, "plain.pth")
    assert read_state(Path("plain.pth"))["a"].shape == (1 << 20,)
    with zipfile.ZipFile("plain.pth") as plain, zipfile.ZipFile("bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    with pytest.raises(UnsupportedModelError, match="unpacks to"):
        read_state(Path("bomb.pth"))


def test_an_archive_of_an_older_torch_is_not_tried(members: dict[str, bytes], folder: Path) -> None:
    """torch.export.load would unpickle its parts."""
    old = {"version": b"8.8", **dict.fromkeys(("serialized_state_dict.pt", "serialized_constants.pt"), _saved(Payload()))}
    with zipfile.ZipFile("old.pt2", "w") as archive:
        for name, content in {
            **old,
            "serialized_exported_program.json": b"{}",
            "serialized_example_inputs.pt": _saved(Payload()),
        }.items():
            archive.writestr(name, content)
    with pytest.raises(UnsupportedModelError):
        load_exported_program(Path("old.pt2"))
    assert not (folder / "harmed").exists()
