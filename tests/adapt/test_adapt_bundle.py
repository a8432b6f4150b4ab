"""From statistics to a new version: found, tried, exchanged and taken back; refused with the bundle as it was."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapt_bundles import (
    CLASSES,
    DARK,
    PREPROCESSING,
    alone,
    contents,
    outputs_of,
    pictures,
    pixels,
    record,
    run_here,
    write_dark_bundle,
)
from PIL import Image

from qsearch.adapt import statistics, versions
from qsearch.adapt.replay import Modules
from qsearch.adapt.session import adapt_bundle, apply_adaptation, labelled_trial
from qsearch.adapt.validate import Trial
from qsearch.errors import BundleCorruptError, BundleError, DataError, TargetMismatchError, UntrustedError
from qsearch.export import monitor, rescale, runner
from qsearch.export.bundle_seal import has_own_seal, seal_bundle
from qsearch.export.verify import verify_bundle
from qsearch.seal import SEAL

ROOT = Path(__file__).parents[2]
# The main process of adapting imports neither TVM nor torch; what runs modules is another, with the runtime alone.
WITHOUT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tvm", "torch", "optuna", "onnx"):
            raise ImportError(name + " must not be needed")
sys.meta_path.insert(0, Blocked())
from pathlib import Path
from qsearch.adapt.session import adapt_bundle, apply_adaptation
print(apply_adaptation(adapt_bundle(Path(sys.argv[1]), Path(sys.argv[2])))["seconds"])
"""


@pytest.fixture
def copy(dark_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dark_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def bright(dark_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of pictures that are brighter than those of calibration."""
    return record(dark_bundle, tmp_path_factory.mktemp("bright") / "stats.npz", pictures(128, seed=2))


@pytest.fixture(scope="module")
def usual(dark_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of pictures like those of calibration."""
    return record(dark_bundle, tmp_path_factory.mktemp("usual") / "stats.npz", pictures(128, DARK, seed=3))


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules run in this process; the test of what needs no compiler starts others."""
    monkeypatch.setattr(Modules, "_run", run_here)


def test_a_shift_is_found_and_new_scales_take_the_bundles_place(copy: Path, bright: Path, tmp_path: Path) -> None:
    before, given = contents(copy), pictures(64, seed=4)
    old = outputs_of(copy / "model.so", given)
    found = adapt_bundle(copy, bright)
    assert contents(copy) == before
    first = found.values[0]
    assert first.moved and first.index > first.threshold
    assert next(row for row in found.values if row.name == "input").clipped > 0.2
    assert found.verdict is not None and found.verdict.accepted
    assert found.verdict.divergence_after < 0.2 * found.verdict.divergence_before
    done = apply_adaptation(found)
    assert (done["version"], done["previous"]) == (2, str(tmp_path / "bundle.v1"))
    assert contents(tmp_path / "bundle.v1") == before
    manifest = runner.read_manifest(copy)
    recorded = runner.recorded_inputs(copy, manifest)
    assert np.array_equal(outputs_of(copy / "model.so", recorded), np.load(copy / "recorded_outputs.npy"))
    assert (outputs_of(copy / "model.so", given) != old).any()
    metrics = json.loads((copy / "metrics.json").read_text())
    assert metrics["adapted"]["images"] == 128 and "replaced" in metrics["remark"]
    # What was recorded is what is usual now: the same pictures are no shift of the new version.
    again = adapt_bundle(copy, record(copy, tmp_path / "again.npz", pictures(128, seed=5)))
    assert again.scales is None and again.verdict is None
    with pytest.raises(BundleError, match="nothing has moved"):
        apply_adaptation(again)


def test_back_and_forth(copy: Path, bright: Path, tmp_path: Path) -> None:
    before = contents(copy)
    with pytest.raises(BundleError, match="no version to go back to"):
        versions.rollback(copy)
    apply_adaptation(adapt_bundle(copy, bright))
    second = contents(copy)
    assert versions.rollback(copy) == (2, 1)
    assert contents(copy) == before and contents(tmp_path / "bundle.v2") == second
    # Numbers are not used twice.
    assert apply_adaptation(adapt_bundle(copy, bright))["version"] == 3
    (tmp_path / "bundle.v1" / "model.so").write_bytes(b"spoilt")
    third = contents(copy)
    with pytest.raises(BundleCorruptError, match="was changed"):
        versions.rollback(copy)
    shutil.rmtree(tmp_path / "bundle.v1")
    with pytest.raises(BundleError, match="is missing"):
        versions.rollback(copy)
    shutil.copytree(tmp_path / "bundle.v2", tmp_path / "bundle.v1")
    with pytest.raises(BundleError, match="is not what version 3 of bundle was made from"):
        versions.rollback(copy)
    assert contents(copy) == third


def test_a_process_that_dies_before_the_exchange_leaves_the_bundle(
    copy: Path, bright: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(copy)
    found = adapt_bundle(copy, bright)
    with monkeypatch.context() as patch:
        patch.setattr(versions, "_exchange", lambda *_: (_ for _ in ()).throw(BundleError("stopped")))
        with pytest.raises(BundleError, match="stopped"):
            apply_adaptation(found)
    assert contents(copy) == before
    with pytest.raises(BundleError, match="no version to go back to"):
        versions.rollback(copy)
    assert apply_adaptation(found)["version"] == 3
    assert versions.rollback(copy) == (3, 1) and contents(copy) == before
    assert not list(tmp_path.glob(".*"))


def test_a_file_system_that_exchanges_nothing(copy: Path, bright: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions.ctypes, "CDLL", lambda *_, **__: object())
    before = contents(copy)
    with pytest.raises(BundleError, match="cannot exchange"):
        apply_adaptation(adapt_bundle(copy, bright))
    assert contents(copy) == before


def test_replacing_scales_needs_no_compiler(copy: Path, bright: Path) -> None:
    done = alone("-c", WITHOUT, copy, bright)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.0
    assert json.loads((copy / "manifest.json").read_text())["version"] == 2
    assert verify_bundle(copy)["mismatching_bits"] == 0


def test_without_a_shift_nothing_is_proposed(copy: Path, usual: Path) -> None:
    found = adapt_bundle(copy, usual)
    assert found.scales is None and not any(row.moved for row in found.values)
    assert found.to_json()["drifted"] is False


def test_scales_that_are_no_better_are_refused(copy: Path, bright: Path, tmp_path: Path) -> None:
    """Tried on dark pictures, which the old scales were made for."""
    before = contents(copy)
    found = adapt_bundle(copy, bright, Trial(pictures(64, DARK, seed=6), None, "recorded"))
    assert found.verdict is not None and not found.verdict.accepted and "no closer" in found.verdict.reason
    with pytest.raises(BundleError, match="refused"):
        apply_adaptation(found)
    assert contents(copy) == before and not (tmp_path / "bundle.v1").exists()


def test_labels_decide_where_there_are_some(copy: Path, bright: Path, tmp_path: Path) -> None:
    given = pictures(64, seed=7)
    old = outputs_of(copy / "model.so", given).argmax(1)
    found = adapt_bundle(copy, bright, Trial(given, old, "labelled"))
    # What the old module gives is right by definition: the new one can only lose.
    assert found.verdict is not None and not found.verdict.accepted and "fewer right" in found.verdict.reason
    assert found.verdict.right_before == 64
    apply_adaptation(adapt_bundle(copy, bright))
    new = outputs_of(copy / "model.so", given).argmax(1)
    versions.rollback(copy)
    found = adapt_bundle(copy, bright, Trial(given, new, "labelled"))
    assert found.verdict is not None and found.verdict.accepted and found.verdict.right_after == 64


def test_too_few_images_to_try_scales_on(copy: Path, dark_bundle: Path, tmp_path: Path) -> None:
    few = record(dark_bundle, tmp_path / "few.npz", pictures(4, seed=2))
    verdict = adapt_bundle(copy, few).verdict
    assert verdict is not None and not verdict.accepted and "fewer than 16" in verdict.reason


def test_labelled_folders(copy: Path, tmp_path: Path) -> None:
    for index, image in enumerate(pixels(14)):
        folder = tmp_path / "data" / CLASSES[index % 7]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index}.png")
    trial = labelled_trial(copy, tmp_path / "data")
    assert sorted(trial.labels.tolist()) == sorted([*range(7), *range(7)])
    assert trial.images.shape == (14, 3, 12, 10)
    with pytest.raises(DataError, match="does not exist"):
        labelled_trial(copy, tmp_path / "none")


def changed(bundle: Path, change) -> None:
    """Change a manifest and make it consistent again."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    manifest["self_sha256"] = runner.own_digest(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    seal_bundle(bundle)


def test_bundles_that_cannot_be_adapted(copy: Path, bright: Path, tmp_path: Path) -> None:
    changed(copy, lambda manifest: manifest.update(format=1))
    with pytest.raises(BundleCorruptError, match="has format 1"):
        adapt_bundle(copy, bright)
    changed(copy, lambda manifest: manifest.update(format=runner.FORMAT))
    changed(copy, lambda manifest: manifest["target"].update(arch="sm_90"))
    with pytest.raises(BundleError, match="is for a GPU, sm_90"):
        adapt_bundle(copy, bright)
    changed(copy, lambda manifest: manifest["target"].update(arch="", architecture="sparc"))
    with pytest.raises(TargetMismatchError, match="sparc"):
        adapt_bundle(copy, bright)
    changed(copy, lambda manifest: manifest["target"].update(architecture="x86_64"))
    changed(copy, lambda manifest: manifest["sha256"].pop(rescale.RECORD))
    (copy / rescale.RECORD).unlink()
    with pytest.raises(BundleCorruptError, match="exported without it"):
        adapt_bundle(copy, bright)
    (copy / "model.so").write_bytes(b"spoilt")
    with pytest.raises(BundleCorruptError, match="model.so was changed"):
        adapt_bundle(copy, bright)
    with pytest.raises(BundleCorruptError, match="not a bundle"):
        adapt_bundle(tmp_path / "none", bright)


def test_statistics_that_cannot_be_used(copy: Path, bright: Path, tmp_path: Path) -> None:
    before = contents(copy)
    short, junk = tmp_path / "short.npz", tmp_path / "junk.npz"
    short.write_bytes(bright.read_bytes()[:-100])
    junk.write_bytes(b"junk")
    spoilt = tmp_path / "spoilt.npz"
    with np.load(bright) as archive:
        arrays = dict(archive)
    np.savez_compressed(spoilt, **(arrays | {"counts": arrays["counts"] + 1}))
    other = tmp_path / "other.npz"
    header = json.loads(arrays["header"].tobytes()) | {"module": "0" * 64}
    np.savez_compressed(other, **(arrays | {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)}))
    for file, words in {
        short: "cut short",
        junk: "cut short",
        spoilt: "is damaged",
        other: "recorded with another module",
        copy / rescale.RECORD: "has format qsearch-scales",
        tmp_path / "none.npz": "cannot read the statistics",
    }.items():
        with pytest.raises(DataError, match=words):
            adapt_bundle(copy, file)
    apply_adaptation(adapt_bundle(copy, bright))
    with pytest.raises(DataError, match="or another version of it"):
        adapt_bundle(copy, bright)
    assert contents(tmp_path / "bundle.v1") == before


def test_a_bundle_of_somebody_else_is_run_when_trusted_and_stays_theirs(copy: Path, bright: Path, tmp_path: Path) -> None:
    assert has_own_seal(copy, runner.read_manifest(copy))
    (copy / SEAL).write_text("0" * 64)
    with pytest.raises(UntrustedError, match="its seal is not this user's.*--trust runs it"):
        adapt_bundle(copy, bright)
    (copy / SEAL).unlink()
    with pytest.raises(UntrustedError, match="it has no seal"):
        adapt_bundle(copy, bright)
    apply_adaptation(adapt_bundle(copy, bright, trust=True))
    with pytest.raises(UntrustedError):
        verify_bundle(copy)
    # The way back runs nothing.
    assert versions.rollback(copy) == (2, 1)
    own = Path(shutil.copytree(copy, tmp_path / "own"))
    seal_bundle(own)
    apply_adaptation(adapt_bundle(own, bright))
    assert has_own_seal(own, runner.read_manifest(own))


def test_statistics_made_to_do_harm(copy: Path, bright: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their digest is right: whoever writes a file can compute it."""
    with np.load(bright) as archive:
        arrays = dict(archive)
    header = json.loads(arrays["header"].tobytes())

    def refused(words: str, **changes: Any) -> None:
        given = {name: changes.get(name, arrays[name]) for name in ("counts", "kept")}
        known = header | {"digest": monitor.digest(*given.values())} | changes.get("header", {})
        file = tmp_path / "harm.npz"
        np.savez_compressed(file, header=np.frombuffer(json.dumps(known).encode(), np.uint8), **given)
        with pytest.raises(DataError, match=words):
            adapt_bundle(copy, file)

    counts, kept = arrays["counts"], arrays["kept"]
    refused("is damaged", counts=-counts)
    refused("is damaged", counts=counts.astype(np.float64))
    refused("is damaged", header={"images": "many"})
    refused("is damaged", header={"module": 7})
    refused("is damaged", header={"digest": None})
    refused("no image", header={"batches": 0})
    refused("not what the module", kept=kept[:, :-1])
    refused("not what the module", kept=kept.astype(np.float64))
    refused("holds no statistics", header={"images": [[[]]] * 3, "deep": json.loads("[" * 90 + "]" * 90)})
    bomb = tmp_path / "bomb.npz"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("counts.npy", bytes(1 << 24))
    monkeypatch.setattr(statistics, "MOST_BYTES", 1 << 20)
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(DataError, match="too large"):
        adapt_bundle(copy, bomb)


def test_a_module_without_8_bit_values(bright: Path, tmp_path: Path) -> None:
    bundle = write_dark_bundle(tmp_path / "float", tmp_path / "kernels", "fp32")
    with pytest.raises(BundleError, match="no 8-bit values"):
        adapt_bundle(bundle, bright)


def test_a_module_that_takes_pixels(tmp_path: Path) -> None:
    """Its input is a table of pixels, and what it gives are classes, which are compared as such."""
    bundle, given = write_dark_bundle(tmp_path / "bundle", tmp_path / "kernels", takes_pixels=True), pixels(200, seed=4)
    plain = write_dark_bundle(tmp_path / "plain", tmp_path / "kernels")
    assert adapt_bundle(bundle, record(bundle, tmp_path / "dark.npz", pixels(64, DARK, seed=3))).scales is None
    found = adapt_bundle(bundle, record(bundle, tmp_path / "bright.npz", pixels(200, seed=2)))
    assert found.verdict is not None and found.verdict.accepted
    apply_adaptation(found)
    # The same pictures, normalised, move a module that takes floats to the same scales.
    apply_adaptation(adapt_bundle(plain, record(plain, tmp_path / "plain.npz", pictures(200, seed=2))))
    normalised = runner.normalised(given, PREPROCESSING.to_json())
    assert np.array_equal(outputs_of(bundle / "model.so", given), outputs_of(plain / "model.so", normalised).argmax(1))
