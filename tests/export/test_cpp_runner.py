"""The C++ runner of a bundle: builds by the line it states, gives the recorded outputs bit for bit, and notices others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from real_search import RealSearch, within

from qsearch.export import runner


@pytest.fixture(scope="module")
def built(bundles: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with its runner beside it, built by what the source says."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    bundle = Path(shutil.copytree(bundles[0], tmp_path_factory.mktemp("cpp") / "bundle"))
    lines = [line.removeprefix("//   ") for line in (bundle / "run.cpp").read_text().splitlines() if line.startswith("//   ")]
    script = "\n".join(line for line in lines if line.startswith(("F=", "T=", "g++")))
    assert script.count("\n") == 2
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "PYTHONPATH": ""}
    subprocess.run(["sh", "-ec", script], cwd=bundle, env=environment, check=True, capture_output=True, text=True)
    return bundle


def run(bundle: Path, *arguments: str, cwd: str = "/") -> subprocess.CompletedProcess[str]:
    """Run it where nothing of Python's is known."""
    command = [str(bundle / "run"), *arguments]
    return subprocess.run(command, cwd=cwd, env={}, capture_output=True, text=True, check=False)


def test_the_recorded_outputs_bit_for_bit(built: Path) -> None:
    result = run(built)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["images"], document["batch"], document["mismatching_bits"], document["threads"]) == (16, 1, 0, 1)
    assert document["latency_ms"] > 0 and document["loop_images_per_s"] > 0
    # More than the library, less than a Python that has loaded NumPy and TVM.
    assert 2**20 < document["peak_rss_bytes"] < 2**27


def test_a_changed_output_is_counted(built: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    outputs = np.load(copy / "recorded_outputs.npy")
    outputs.view(np.uint8)[3, 1] ^= 5
    np.save(copy / "recorded_outputs.npy", outputs)
    result = run(built, str(copy))
    assert result.returncode == 1
    assert json.loads(result.stdout)["mismatching_bits"] == 2


def test_what_cannot_be_run(built: Path, tmp_path: Path) -> None:
    result = run(built, str(tmp_path))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"problem: cannot read {tmp_path}/manifest.json\n"
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    (copy / "recorded_inputs.npy").write_bytes(b"nothing")
    result = run(built, str(copy))
    assert result.returncode == 1 and "recorded_inputs.npy is no .npy file" in result.stderr


def test_a_module_that_takes_pixels(built: Path, real: RealSearch, tmp_path: Path) -> None:
    bundle = tmp_path / "pixels"
    export = ("export", "--study", "real", "--pick", "smallest", "--with-preprocess", "--out", str(bundle))
    assert within(real.folder, *export).returncode == 0
    result = run(built, str(bundle))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["mismatching_bits"] == 0


@pytest.mark.parametrize("options", [(), ("--with-preprocess",)])
def test_a_module_that_takes_several_images(built: Path, small: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """Three at a time, of sixteen: the last batch is one image, which is repeated; its other outputs do not count."""
    bundle = tmp_path / "batches"
    export = ("export", "--config", "int8", "--model", "broken_networks:Net", "--data", "data", "--batch", "3", *options)
    result = within(small, *export, "--out", str(bundle))
    assert result.returncode == 0, result.stderr
    assert (bundle / "run.cpp").read_text() == (built / "run.cpp").read_text()
    result = run(built, str(bundle))
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["images"], document["batch"], document["mismatching_bits"]) == (16, 3, 0)
    outputs = np.load(bundle / "recorded_outputs.npy")
    for image in (1, 15):
        outputs[image : image + 1].view(np.uint8).reshape(-1)[0] ^= 1
    np.save(bundle / "recorded_outputs.npy", outputs)
    assert json.loads(run(built, str(bundle)).stdout)["mismatching_bits"] == 2


def test_eight_inputs_of_a_picture() -> None:
    picture = np.arange(2 * 3 * 2, dtype=np.uint8).reshape(1, 2, 3, 2)
    inputs = runner.varied(picture)
    assert inputs.shape == (8, 2, 3, 2)
    assert len({one.tobytes() for one in inputs}) == 8
    assert np.array_equal(inputs[0], picture[0])
    assert np.array_equal(inputs[1], picture[0, :, ::-1])
    assert np.array_equal(inputs[6], 255 - picture[0, ::-1])
