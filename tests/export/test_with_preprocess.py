"""Bundles whose module takes pixels and gives the class."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from real_search import fails, within

from qsearch.data import Preprocessing
from qsearch.errors import BundleError, UsageError
from qsearch.export import runner
from qsearch.export.from_study import check_classes, recorded_inputs, require_pictures
from qsearch.export.verify import predict_images, read_bundle_preprocessing

EXPORT = ("export", "--study", "small", "--pick", "smallest", "--out")


@pytest.fixture(scope="module")
def pair(small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One trial's bundle without and with it."""
    folder = tmp_path_factory.mktemp("pair")
    for name, options in (("without", ()), ("with", ("--with-preprocess",))):
        result = within(small, *EXPORT, str(folder / name), *options)
        assert result.returncode == 0, result.stderr
    return folder / "without", folder / "with"


def test_it_replays_and_says_what_it_takes(pair: tuple[Path, Path]) -> None:
    bundle = pair[1]
    result = within(bundle.parent, "verify", str(bundle), "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["mismatching_bits"] == 0
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["input"] == {"dtype": "uint8", "layout": "NHWC", "shape": [1, 16, 16, 3]}
    assert json.loads((pair[0] / "manifest.json").read_text())["input"]["dtype"] == "float32"
    assert "normalisation" in manifest["metrics"]["remark"]
    recorded = np.load(bundle / "recorded_outputs.npy")
    assert (recorded.dtype, recorded.shape) == (np.int32, (16,))
    assert np.array_equal(recorded, np.load(pair[0] / "recorded_outputs.npy").argmax(1))


def test_the_same_classes_of_pictures(pair: tuple[Path, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    paths = [tmp_path / f"{i}.png" for i in range(12)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    without, inside = (json.loads(within(tmp_path, "run", str(one), *map(str, paths), "--json").stdout) for one in pair)
    assert [row["best"] for row in inside] == [
        [{"class": row["best"][0]["class"], "name": row["best"][0]["name"]}] for row in without
    ]
    assert within(tmp_path, "run", str(pair[1]), str(paths[0])).stdout == f"{paths[0]}: {inside[0]['best'][0]['name']}\n"


def test_images_of_the_wrong_kind(pair: tuple[Path, Path]) -> None:
    with pytest.raises(runner.BundleProblem, match=r"takes uint8 images of shape \(N, 16, 16, 3\), NHWC; got float32"):
        runner.outputs(pair[1], np.zeros((1, 3, 16, 16), np.float32))
    with pytest.raises(runner.BundleProblem, match=r"takes float32 images of shape \(N, 3, 16, 16\), NCHW; got uint8"):
        runner.outputs(pair[0], np.zeros((1, 16, 16, 3), np.uint8))
    assert read_bundle_preprocessing(pair[1]).crop == (16, 16)
    assert len(predict_images(pair[1], runner.normalised(np.zeros((2, 16, 16, 3), np.uint8), {"mean": [0.5], "std": [0.5]}))) == 2


def test_classes_that_differ_are_not_exported() -> None:
    preprocessing = Preprocessing(None, (2, 2), (0.5,) * 3, (0.5,) * 3)
    images = runner.normalised(np.zeros((3, 2, 2, 3), np.uint8), preprocessing.to_json())
    given = SimpleNamespace(
        dataset=SimpleNamespace(preprocessing=preprocessing),
        images=lambda part: images,
        outputs=lambda module, pixels: np.array([0, 1, 1], np.int32),
    )
    logits = np.array([[1, 0], [0, 1], [0, 1]], np.float32)
    check_classes(given, None, logits)  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="another class on 1 of 3 search images"):
        check_classes(given, None, logits[[0, 1, 0]])  # type: ignore[arg-type]


def test_whom_it_is_for(small: Path) -> None:
    with pytest.raises(UsageError, match="for classifiers"):
        require_pictures(SimpleNamespace(head=object()))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="for CPUs"):
        require_pictures(SimpleNamespace(head=None, target=SimpleNamespace(arch="sm_90", description="x")))  # type: ignore[arg-type]
    fails(small, 2, ("are for bundles",), *EXPORT, "x.onnx", "--format", "onnx", "--with-preprocess")


def test_images_that_are_no_pixels_are_recorded_as_they_are(pair: tuple[Path, Path]) -> None:
    preprocessing = read_bundle_preprocessing(pair[0])
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    images = runner.normalised(pixels, preprocessing.to_json())
    stored, given = recorded_inputs(images, preprocessing)
    assert stored.dtype == np.uint8 and np.array_equal(stored, pixels[:2])
    assert np.array_equal(given[::8], images[:2]) and len(given) == 16
    stored, given = recorded_inputs(images + np.float32(0.001), preprocessing)
    assert stored.dtype == np.float32 and np.array_equal(stored, given) and len(given) == 16
