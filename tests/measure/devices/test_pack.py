"""Packs: what they hold is right and timed wherever they run, and what is wrong with them is said."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tvm
from packs import changed_pack, make_pack, programs, run_pack

from qsearch.build.link import Linker
from qsearch.build.object_cache import ObjectCache, compiler_for
from qsearch.build.target import host_architecture, open_target
from qsearch.errors import MeasureError, ToolchainError, UsageError
from qsearch.measure.devices import kernel_cases, pack_runner
from qsearch.measure.devices.run_pack import measure_pack_file
from qsearch.quantize.program import INTEGERS


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A pack with every kernel of a network in three precisions, and the table that it gives by itself."""
    folder = tmp_path_factory.mktemp("pack")
    file = make_pack(folder, programs("residual", "fp32", "int8", "int16"), tiles=2)
    done = run_pack(file, "--out", "table.json")
    assert done.returncode == 0, done.stderr + done.stdout
    return file, json.loads((folder / "table.json").read_text())


def test_every_kernel_is_right_and_timed(packed):
    file, table = packed
    linker = Linker(ObjectCache(file.parent / "kernels", open_target("host")))
    found = programs("residual", "fp32", "int8", "int16")
    needed = {call.symbol for program in found for call in linker.plan(program).calls}
    assert needed < set(table["kernels"])
    for kernel in table["kernels"].values():
        assert kernel["exact"] and 0 < kernel["quartiles"][0] <= kernel["seconds"] <= kernel["quartiles"][1]
    assert table["target"]["description"] == linker.target.description
    assert table["device"] and table["date"] and table["versions"]["tvm"] == tvm.__version__
    assert table["call"]["direct_seconds"] > 0 and table["call"]["in_module_seconds"] > 0


def test_candidate_tiles_share_a_group_and_their_kernel_is_the_one_in_use(packed):
    file, table = packed
    linker = Linker(ObjectCache(file.parent / "kernels", open_target("host")))
    (program,) = programs("residual", "int8")
    call = next(call for call in linker.plan(program).calls if call.op.key.kind == "conv2d")
    (used, _, tile), other = linker.candidates(call.op.key, 2)
    assert used == call.symbol
    assert table["kernels"][used]["tile"] == vars(tile) != vars(other[2])
    assert table["kernels"][used]["tile_group"] == table["kernels"][other[0]]["tile_group"] != ""


def test_the_package_measures_a_pack_with_its_own_runner(packed, tmp_path):
    found = measure_pack_file(packed[0], tmp_path / "table.json")
    assert found["wrong"] == 0 and found["kernels"] == len(packed[1]["kernels"])
    assert set(json.loads((tmp_path / "table.json").read_text())["kernels"]) == set(packed[1]["kernels"])


def test_a_wrong_kernel_is_named_and_has_no_time(tmp_path, monkeypatch):
    right = kernel_cases.run_op
    monkeypatch.setattr(kernel_cases, "run_op", lambda op, inputs: right(op, inputs) + (op.key.kind == "avg_pool2d"))
    file = make_pack(tmp_path, programs("residual", "fp32"))
    done = run_pack(file, "--out", "table.json")
    assert done.returncode == 1, done.stderr
    wrong = {
        symbol: one for symbol, one in json.loads((tmp_path / "table.json").read_text())["kernels"].items() if not one["exact"]
    }
    ((symbol, record),) = wrong.items()
    assert "seconds" not in record and "outputs are wrong" in record["problem"]
    assert list(json.loads(done.stdout)["problems"]) == [symbol]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_an_output_that_is_not_written_is_wrong_whatever_it_should_be(dtype):
    bench = pack_runner.Bench(tvm, tvm.cpu(0), None, 1)
    for poison in pack_runner.POISONS:
        expected = np.full(16, poison, np.uint8).view(dtype)
        assert "wrong" in bench.check(lambda output: None, expected, None, [])
    zeros = np.zeros(16, dtype)
    assert bench.check(lambda output: output.copyfrom(zeros), zeros, None, []) is None
    assert "wrong" in bench.check(lambda output: output.copyfrom(zeros + 2), zeros, 1e-3, [])


def test_inputs_have_edges():
    (program,) = programs("residual", "int8")
    ranges = kernel_cases.value_ranges(program)
    convolution = [op for op in program.ops if op.key.kind == "conv2d"][1]
    low, high, zero = ranges[convolution.inputs[0]]
    rng = np.random.default_rng(0)
    values = kernel_cases._values(rng, convolution.key.shapes[0], "uint8", (low, high, zero), 0.0)
    assert {low, high, zero} <= set(values.ravel().tolist()) and low <= values.min() <= values.max() <= high
    producer = next(op for op in program.ops if op.output.name == convolution.inputs[0])
    assert (low, high) == tuple(producer.constants["integers"][INTEGERS.index(name)] for name in ("qmin", "qmax"))
    ties = kernel_cases._values(rng, (800,), "float32", None, 0.5)
    assert np.abs(ties).max() == 5000 and 0 in ties and ((ties / 0.5) % 1 == 0.5).sum() >= 90


def _flip(manifest: dict, members: dict[str, bytes]) -> None:
    name = next(one for one in members if one.startswith("data/"))
    members[name] = members[name][:-1] + bytes([members[name][-1] ^ 1])


def _add(manifest: dict, members: dict[str, bytes]) -> None:
    members["kernels/more.so"] = b"code"


def _climb(manifest: dict, members: dict[str, bytes]) -> None:
    members["kernels/../../climbed"] = b"code"


TAMPERED = {
    "changed": (_flip, False, MeasureError, "was changed"),
    "more": (_add, False, MeasureError, "not listed"),
    "unsafe": (_climb, True, MeasureError, "no safe path"),
    "newer": (lambda manifest, members: manifest.update(schema=99), True, UsageError, "schema 99"),
    "other TVM": (lambda manifest, members: manifest.update(versions={"tvm": "0.99"}), True, UsageError, "TVM 0.99"),
    "other machine": (lambda manifest, members: manifest["target"].update(architecture="sparc"), True, UsageError, "sparc"),
    "other processor": (lambda manifest, members: manifest["target"].update(cpu_flags=["amx9"]), True, UsageError, "amx9"),
    "no GPU": (lambda manifest, members: manifest["target"].update(device="cuda"), True, UsageError, "--out table.json"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_pack_that_cannot_be_used_says_why(packed, tmp_path, what):
    change, sealed, kind, words = TAMPERED[what]
    if what == "no GPU" and tvm.cuda(0).exist:
        pytest.skip("there is one")
    file = changed_pack(packed[0], tmp_path / "other.pack", change, sealed)
    with pytest.raises(pack_runner.PackProblem, match=words) as caught:
        pack_runner.measure_pack(str(file))
    assert (pack_runner.ELSEWHERE if kind is UsageError else 1) == caught.value.status


def test_what_is_no_pack_is_refused(packed, tmp_path):
    (tmp_path / "half.pack").write_bytes(packed[0].read_bytes()[:1000])
    with pytest.raises(MeasureError, match="cannot be read as a pack"):
        measure_pack_file(tmp_path / "half.pack", tmp_path / "table.json")
    other = changed_pack(packed[0], tmp_path / "other.pack", TAMPERED["other TVM"][0])
    with pytest.raises(UsageError, match=r"pip install apache-tvm==0\.99"):
        measure_pack_file(other, tmp_path / "table.json", trust=True)


def test_linking_for_another_architecture_needs_its_linker(monkeypatch):
    other = "aarch64:neoverse-n1" if host_architecture() == "x86_64" else "haswell"
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ToolchainError, match=r"install .*-linux-gnu-g\+\+"):
        compiler_for(open_target(other))


@pytest.mark.parametrize(("exists", "version", "message"), [(True, "8.0", "GPU is sm_80"), (False, "", "no CUDA device is here")])
def test_a_gpu_that_cannot_run_the_pack_is_named(exists: bool, version: str, message: str) -> None:
    device = SimpleNamespace(exist=exists, compute_version=version, device_name="some GPU")
    fake = SimpleNamespace(__version__="1", device=lambda kind, number: device)
    target = {"device": "cuda", "arch": "sm_90", "name": "cuda:sm_90"}
    manifest = {"target": target, "versions": {"tvm": "1"}}
    with pytest.raises(pack_runner.PackProblem, match=message):
        pack_runner.open_device(fake, manifest, "kernels.pack", "some CPU")
    device.exist, device.compute_version = True, "9.0"
    assert pack_runner.open_device(fake, manifest, "kernels.pack", "some CPU") == (device, "some GPU")
