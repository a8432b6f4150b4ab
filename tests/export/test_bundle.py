"""Bundles of a real study: whole, replayed bit for bit, run without qsearch, refused once changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from real_search import RealSearch, command, fails, refused, within

from qsearch.data import Preprocessing, decode
from qsearch.errors import BundleError
from qsearch.export import predict, runner
from qsearch.export.bundle import require_vacant
from qsearch.export.bundle_seal import seal_bundle
from qsearch.models.demo import load_images
from qsearch.seal import SEAL

FILES = (
    "README.md",
    "classes.json",
    "config.json",
    "manifest.json",
    "metrics.json",
    "model.so",
    "monitor.py",
    "predict.py",
    "preprocessing.json",
    "recorded_inputs.npy",
    "recorded_outputs.npy",
    "rescale.py",
    "run.cpp",
    "run.py",
    "scales.npz",
)

# Runs a bundle's run.py in a process that cannot import what a deployment does not have.
ALONE = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchvision", "qsearch", "optuna", "PIL", "scipy", "typer"}:
            raise ImportError(f"{name} must not be needed")
sys.meta_path.insert(0, Blocked())
code = 0
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    code = stop.code
libraries = {line.split("/")[-1].strip() for line in open("/proc/self/maps") if "libtvm" in line}
print(sorted(name for name in libraries if "ffi" not in name), file=sys.stderr)
sys.exit(code)
"""


def alone(bundle: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a bundle by itself."""
    return script_alone(bundle, "run.py", str(bundle), *arguments)


def script_alone(bundle: Path, script: str, *arguments: str, without: str = "PIL") -> subprocess.CompletedProcess[str]:
    """Run a script of a bundle."""
    code = ALONE.replace("sys.argv[0], run_name", f"{str(bundle / script)!r}, run_name").replace('"PIL"', repr(without))
    code = code.replace("import runpy, sys\n", f"import runpy, sys\nsys.path.insert(0, {str(bundle)!r})\n")
    command = [sys.executable, "-c", code, *arguments]
    environment = os.environ | {"TVM_USE_RUNTIME_LIB": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=bundle.parent, env=environment)


@pytest.fixture
def copy(bundles: list[Path], tmp_path: Path) -> Path:
    """A bundle to spoil."""
    return Path(shutil.copytree(bundles[0], tmp_path / "bundle"))


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Fashion-MNIST test images as PNG, in grey as they are."""
    images, _ = load_images()
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, image in zip(paths, images, strict=False):
        Image.fromarray(image).save(path)
    return paths


def test_every_bundle_replays_bit_for_bit(real: RealSearch, bundles: list[Path]) -> None:
    assert len(bundles) == len(real.document["front"])
    for bundle in bundles:
        result = real.json("verify", str(bundle))
        assert result["mismatching_bits"] == 0
        assert result["outputs"] == 16 * 10
        assert tuple(sorted(file.name for file in bundle.iterdir())) == (*FILES, SEAL)
    assert not list(bundles[0].parent.glob(".*"))


def test_picks_and_trials(small: Path, tmp_path: Path) -> None:
    front = json.loads(within(small, "front", "--study", "small", "--json").stdout)["front"]
    fastest = exported(small, tmp_path / "fastest", "--pick", "fastest")
    # By the held-out measurement, dominated points aside.
    kept = [point for point in front if point["heldout"]["dominated_by"] is None] or front
    assert fastest == min(kept, key=lambda point: point["heldout"]["latency_ms"])["trial"]
    dead = tmp_path / ".zero.999999999-dead"
    dead.mkdir()
    assert exported(small, tmp_path / "zero", "--trial", "0") == 0
    assert json.loads((tmp_path / "zero" / "metrics.json").read_text())["trial"] == 0
    assert not dead.exists()


def exported(folder: Path, out: Path, *how: str) -> int:
    """Export one bundle and give the number of its trial."""
    result = within(folder, "export", "--study", "small", *how, "--out", str(out), "--json")
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)["bundles"]
    assert row["bundle"] == str(out)
    return int(row["trial"])


def test_the_same_predictions_with_and_without_qsearch(real: RealSearch, bundles: list[Path], pictures: list[Path]) -> None:
    rows = real.json("run", str(bundles[0]), *map(str, pictures))
    assert [row["image"] for row in rows] == [str(path) for path in pictures]
    images, _ = load_images()
    preprocessing = json.loads((bundles[0] / "preprocessing.json").read_text())
    scaled = images[:3, None].astype(np.float32) / np.float32(255)
    given = (scaled - np.float32(preprocessing["mean"][0])) / np.float32(preprocessing["std"][0])
    np.save(pictures[0].parent / "x.npy", given)
    result = alone(bundles[0], "predict", str(pictures[0].parent / "x.npy"))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [row["best"] for row in rows]
    assert [len(row["best"]) for row in rows] == [5, 5, 5]
    assert all(0.5 < sum(entry["probability"] for entry in row["best"]) <= 1.000001 for row in rows)


def test_a_bundle_needs_only_numpy_and_the_runtime_of_tvm(bundles: list[Path]) -> None:
    result = alone(bundles[0])
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["mismatching_bits"] == 0
    assert result.stderr.strip() == "['libtvm_runtime.so']"


def test_pictures_with_the_bundles_own_script(real: RealSearch, bundles: list[Path], pictures: list[Path]) -> None:
    result = script_alone(bundles[0], "predict.py", *map(str, pictures), without="none")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [row["best"] for row in real.json("run", str(bundles[0]), *map(str, pictures))]
    result = script_alone(bundles[0], "predict.py", "none.png", without="none")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("problem: none.png: ")


@pytest.mark.parametrize(
    ("size", "settings"),
    [((60, 41), {"resize": 40}), ((41, 60), {"resize": 33, "interpolation": "bilinear"}), ((37, 33), {"resize": None})],
)
def test_its_pixels_are_those_of_qsearch(tmp_path: Path, size: tuple[int, int], settings: dict[str, Any]) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)
    preprocessing = Preprocessing(**{"crop": (32, 31), "mean": (0.4,) * 3, "std": (0.2,) * 3, **settings})
    assert np.array_equal(
        predict.pixels_of(path, preprocessing.to_json())[None], preprocessing.pixels_of(decode(path, preprocessing)[None])
    )


def test_another_schema_or_a_copy_elsewhere(copy: Path, tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(copy, tmp_path / "other" / "place"))
    result = command(tmp_path, "verify", "other/place", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["mismatching_bits"] == 0
    rewrite_manifest(elsewhere, lambda manifest: manifest.update(format=1))
    refused(command(tmp_path, "verify", "other/place"), 1, "has format 1, this runner reads format 2", "own run.py")
    rewrite_manifest(elsewhere, lambda manifest: manifest.update(format=99))
    result = alone(elsewhere)
    assert result.returncode == 1 and "has format 99" in json.loads(result.stdout)["problem"]


def test_a_bundle_for_a_gpu_that_is_not_there(copy: Path) -> None:
    rewrite_manifest(copy, lambda manifest: manifest["target"].update(arch="sm_90"))
    result = command(copy.parent, "verify", str(copy))
    if "this machine's GPU" not in result.stderr:
        refused(result, 1, "sm_90", "has none that TVM can use")


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_in_any_file(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    result = alone_with_own_runner(copy)
    assert result["code"] == 1
    assert name in result["problem"]
    assert "export the bundle again" in result["problem"]


def alone_with_own_runner(bundle: Path) -> dict[str, Any]:
    """Check a bundle by the package's runner within this process: no module is loaded before its files are checked."""
    from qsearch.export import runner

    try:
        runner.verify(bundle)
    except runner.BundleProblem as problem:
        return {"code": problem.status, "problem": str(problem)}
    return {"code": 0, "problem": ""}


@pytest.mark.parametrize("name", [name for name in FILES])
def test_a_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert name in alone_with_own_runner(copy)["problem"]


def test_a_changed_bundle_on_the_command_line(copy: Path, pictures: list[Path]) -> None:
    preprocessing = copy / "preprocessing.json"
    # Still a valid file, but not the one that was exported.
    preprocessing.write_text(preprocessing.read_text().replace("1", "2", 1))
    refused(command(copy.parent, "verify", str(copy)), 1, "preprocessing.json", "was changed", "export the bundle again")
    refused(command(copy.parent, "run", str(copy), str(pictures[0])), 1, "preprocessing.json", "was changed")
    refused(command(copy.parent, "verify", str(copy.parent / "none")), 1, "none is not a bundle")
    # As with what `export --all` has filled.
    inside = (
        f"is not a bundle: manifest.json cannot be read (No such file or directory); it holds 1, give one of them: {copy.name}"
    )
    refused(command(copy.parent, "verify", str(copy.parent)), 1, inside)


def test_a_bundle_for_another_machine(copy: Path, pictures: list[Path]) -> None:
    rewrite_manifest(copy, lambda manifest: manifest["target"]["cpu_flags"].append("avx9000"))
    refused(command(copy.parent, "verify", str(copy)), 1, "avx9000", "--target portable")
    refused(command(copy.parent, "run", str(copy), str(pictures[0])), 1, "avx9000")
    rewrite_manifest(copy, lambda manifest: manifest["target"].update(architecture="sparc"))
    refused(command(copy.parent, "verify", str(copy)), 1, "sparc")


def test_outputs_that_do_not_replay(copy: Path) -> None:
    outputs = np.load(copy / "recorded_outputs.npy")
    outputs.view(np.uint8)[0, 0] ^= 1
    np.save(copy / "recorded_outputs.npy", outputs)
    digest = hashlib.sha256((copy / "recorded_outputs.npy").read_bytes()).hexdigest()
    rewrite_manifest(copy, lambda manifest: manifest["sha256"].update({"recorded_outputs.npy": digest}))
    refused(command(copy.parent, "verify", str(copy)), 1, "1 of 5120 recorded output bits")


def test_pictures_that_cannot_be_classified(bundles: list[Path], tmp_path: Path) -> None:
    Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save(tmp_path / "colour.png")
    (tmp_path / "junk.png").write_bytes(b"junk")
    for name, words in {
        "colour.png": "--convert-channels",
        "junk.png": "not a readable image",
        "none.png": "does not exist",
    }.items():
        fails(tmp_path, 2, (name, words), "run", str(bundles[0]), name)


@pytest.mark.parametrize(("processors", "threads"), [(1, "1"), (8, "4")])
def test_a_bundle_runs_on_its_threads(
    bundles: list[Path], monkeypatch: pytest.MonkeyPatch, processors: int, threads: str
) -> None:
    from qsearch.export import runner

    for name in ("TVM_USE_RUNTIME_LIB", "TVM_BIND_THREADS", "TVM_NUM_THREADS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(runner, "processor_count", lambda: processors)
    manifest = runner.read_manifest(bundles[0])
    runner.open_module(bundles[0], manifest | {"target": manifest["target"] | {"threads": 4}})
    assert (os.environ["TVM_NUM_THREADS"], os.environ["TVM_BIND_THREADS"]) == (threads, "0")


@pytest.mark.parametrize("threads, latency_ms", [(1, 2.0), (2, 4.0)])
def test_a_module_is_timed_by_the_clock_that_the_search_used(threads: int, latency_ms: float, monkeypatch) -> None:
    """The thread's own where it is one, which stands still half of the time here."""
    spent = [0.0]
    monkeypatch.setattr(runner, "time", SimpleNamespace(thread_time=lambda: spent[0]))

    def time_evaluator(name: str, device: object, number: int, repeat: int) -> Callable[[object], SimpleNamespace]:
        def timed(image: object) -> SimpleNamespace:
            spent[0] += 2e-3 * (number + 1)
            return SimpleNamespace(results=[4e-3] * repeat)

        return timed

    tvm = SimpleNamespace(cpu=lambda: None, runtime=SimpleNamespace(tensor=lambda image, device: image))
    manifest, image = {"target": {"threads": threads}}, np.zeros((1, 1, 2, 2), np.float32)
    found = runner.time_module(SimpleNamespace(time_evaluator=time_evaluator), manifest, tvm, image)
    assert found == {"latency_ms": pytest.approx(latency_ms), "latency_spread_ms": pytest.approx(0.0)}


@pytest.mark.parametrize(
    ("latency", "words"),
    [({"ratio": 0.5}, "in turns with the float module"), ({"ratio": None}, "alone"), ({"source": "modelled"}, "of its kernels")],
)
def test_it_is_told_how_a_latency_was_timed(tmp_path: Path, latency: dict[str, Any], words: str) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps({"search": {"latency": latency}}))
    assert words in runner.recorded_timing(tmp_path)


def test_contradictions_and_occupied_directories(small: Path, bundles: list[Path]) -> None:
    export = ("export", "--study", "small", "--out")
    fails(small, 2, ("--trial and --pick",), *export, "x", "--trial", "0", "--pick", "knee")
    fails(small, 2, ("--all and --max-loss-pp",), *export, "x", "--all", "--max-loss-pp", "1")
    fails(small, 1, ("no completed trial 999",), *export, "x", "--trial", "999")
    fails(small, 1, ("raise --max-loss-pp",), *export, "x", "--max-loss-pp", "-500")
    fails(small, 2, ("'best'", "knee"), *export, "x", "--pick", "best")
    fails(small, 1, ("not an empty directory", "--out"), *export, str(bundles[0]))
    fails(small, 1, ("no study database studies/nowhere.db",), "export", "--study", "nowhere", "--out", "x")
    assert not (small / "x").exists()
    with pytest.raises(BundleError, match="inside the bundle"):
        require_vacant(bundles[0] / "inner")


def rewrite_manifest(bundle: Path, change: Any) -> None:
    """Change a manifest and make it consistent again."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    del manifest["self_sha256"]
    manifest["self_sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    seal_bundle(bundle)
