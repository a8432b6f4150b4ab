"""Several images an inference: the same outputs, other times and bytes, a study of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from image_folders import write_classes
from real_search import SMALL, fails, within

from qsearch.export import runner
from qsearch.search.evaluation.evaluator import Settings
from qsearch.search.evaluation.objective import prepare_evaluator

MODEL = ("--model", "broken_networks:Net", "--data", "data")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few images."""
    root = tmp_path_factory.mktemp("batch")
    write_classes(root / "data")
    return root


def test_evaluate_shows_precisions_batch_by_batch(folder: Path) -> None:
    result = within(folder, "evaluate", *MODEL, "--precision", "fp32,int8", "--batch", "5,1", "--json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert [(row["precision"], row["batch"]) for row in rows] == [("fp32", 1), ("int8", 1), ("fp32", 5), ("int8", 5)]
    for one, five in zip(rows[:2], rows[2:], strict=True):
        # More images than the search part has multiples of five: some are run twice, and none is counted twice.
        assert one["images"] == five["images"] and one["images"] % 5
        assert (one["top1"], one["top5"]) == (five["top1"], five["top5"])
        assert five["peak_bytes"] > one["peak_bytes"]
        assert five["images_per_s"] == pytest.approx(5000 / five["latency_ms"])


def test_a_batch_computes_what_single_images_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    from qsearch.config import named_config

    settings = [
        Settings("broken_networks:Net", data=Path("data"), cache_dir=Path("studies/cache"), batch=batch) for batch in (1, 3)
    ]
    one, three = (prepare_evaluator(each, lambda clause: None) for each in settings)
    assert (one.batch, three.batch) == (1, 3)
    for part in ("search", "heldout"):
        outputs = [each.logits(each.compile(named_config("int8")), part) for each in (one, three)]
        assert len(outputs[0]) % 3
        assert outputs[0].tobytes() == outputs[1].tobytes()


def test_a_search_is_for_one_size_of_batch(folder: Path) -> None:
    options = (*SMALL, "--budget", "2", "--sampler", "random", "--jobs", "1", "--batch", "4")
    result = within(folder, *options, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["trials"]["complete"] == 2
    fails(folder, 1, ("batch was '4'",), *options[:-2])


@pytest.mark.parametrize("text", ["0", "1,,2", "two", "-1"])
def test_what_is_no_batch_is_refused(folder: Path, text: str) -> None:
    fails(folder, 2, ("--batch", "1,8,32"), "evaluate", *MODEL, "--batch", text)


def test_a_bundle_for_batches_replays_and_takes_any_number_of_images(folder: Path) -> None:
    options = (*MODEL, "--config", "int8", "--batch", "3")
    result = within(folder, "export", *options, "--out", "bundle", "--json")
    assert result.returncode == 0, result.stderr
    verified = within(folder, "verify", "bundle", "--json")
    assert verified.returncode == 0, verified.stderr
    assert (folder / "bundle" / "run.cpp").exists()
    single = within(folder, "export", *MODEL, "--config", "int8", "--out", "single", "--json")
    assert single.returncode == 0, single.stderr
    images = np.load(folder / "single" / "recorded_inputs.npy")
    given = runner.normalised(images, json.loads((folder / "single" / "preprocessing.json").read_text()))[:2]
    np.save(folder / "given.npy", given)
    for name in ("bundle", "single"):
        # In processes of their own: they ask for TVM's runtime without its compiler.
        command = [sys.executable, f"{name}/run.py", name, "outputs", "given.npy", f"{name}.npy"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE)
    assert np.load(folder / "bundle.npy").tobytes() == np.load(folder / "single.npy").tobytes()


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_other_formats_take_the_batch(folder: Path, kind: str) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    options = (*MODEL, "--config", "int8", "--batch", "3", "--format", kind, "--out", f"net.{kind}")
    result = within(folder, "export", *options, "--json")
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)["files"]
    # The search part has no multiple of three images: each is compared once.
    assert row["agreement"]["same"] == row["agreement"]["decisions"] == 11


def test_a_module_that_takes_batches_of_pixels(folder: Path) -> None:
    options = (*MODEL, "--config", "int8", "--batch", "3", "--with-preprocess", "--out", "pixels")
    result = within(folder, "export", *options)
    assert result.returncode == 0, result.stderr
    verified = within(folder, "verify", "pixels", "--json")
    assert verified.returncode == 0, verified.stderr
    manifest = json.loads((folder / "pixels" / "manifest.json").read_text())
    assert manifest["input"] == {"dtype": "uint8", "layout": "NHWC", "shape": [3, 16, 16, 3]}
