"""Power cuts: whatever unsynced work a cut takes, the same work again ends well, and nothing claims what is not there."""

from __future__ import annotations

import hashlib
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from analytic import invoke
from optuna.artifacts._upload import ARTIFACTS_ATTR_PREFIX
from optuna.trial import TrialState
from PIL import Image
from power_cut import Journal, Moment, Tree, make, some, watched

from qsearch.adapt.versions import read_bundle, replace_version, rollback, version_of, write_version
from qsearch.build.cache import KernelCache
from qsearch.build.link import Linker
from qsearch.build.target import open_target
from qsearch.calibrate.histogram import BINS, Histogram, TensorStatistics
from qsearch.config import QuantConfig
from qsearch.data.image_file import mapped_images, write_images
from qsearch.export import bundle as bundle_module
from qsearch.export import rescale, runner
from qsearch.export.bundle import BundleContent, write_bundle
from qsearch.export.bundle_seal import seal_bundle
from qsearch.measure.devices.pack import chain_program
from qsearch.measure.kernel_times import KernelTimes
from qsearch.models import module_file
from qsearch.qat.checkpoint import Checkpoint, CheckpointFolder, Epoch
from qsearch.quantize.reference import run_program
from qsearch.quantize.rounding.rounding_file import load_rounding, save_rounding
from qsearch.quantize.weights import QuantizedWeight
from qsearch.search.evaluation import float_pass
from qsearch.search.tables.sensitivity_file import load_sensitivity, save_sensitivity
from qsearch.search.tables.sensitivity_table import Sensitivity

# Kinds of files: what writes them, and what must hold of them in every state, before and after the same again.


def check_states(journal: Journal, scratch: Path, check: Callable[[Path], None], count: int = 40) -> None:
    """Make some of the states and look at each."""
    drawn = some(journal.states(), count)
    assert len(drawn) > 3
    for _, tree in drawn:
        check(make(tree, scratch))


def test_kernels(tmp_path: Path) -> None:
    program = chain_program(1)
    image = np.linspace(-1, 2, 16, dtype=np.float32).reshape(program.input.shape)
    wanted = run_program(program, image)[program.output.name]

    def work(folder: Path) -> None:
        linker = Linker(KernelCache(folder / "kernels", open_target("host")))
        machine = linker.build(program).open()
        np.testing.assert_array_equal(machine["main"](machine.tensor(image)).numpy(), wanted)
        times = KernelTimes(folder / "kernels")
        assert times.get("qs_a") in (None, 0.5)
        times.put({"qs_a": 0.5})
        assert KernelTimes(folder / "kernels").get("qs_a") == 0.5

    with watched(tmp_path / "work") as journal:
        work(tmp_path / "work")
    # A folder of its own for each: a library that was loaded once is not read again from the same place.
    for number, (_, tree) in enumerate(some(journal.states(), 8)):
        work(make(tree, tmp_path / str(number)))


def test_images(tmp_path: Path) -> None:
    rows = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    (tmp_path / "work").mkdir()
    with watched(tmp_path / "work") as journal:
        write_images(tmp_path / "work" / "images-a.npy", rows.shape, rows)

    def check(folder: Path) -> None:
        found = mapped_images(folder / "images-a.npy", rows.shape)
        assert found is None or np.array_equal(found, rows)
        write_images(folder / "images-a.npy", rows.shape, rows)
        again = mapped_images(folder / "images-a.npy", rows.shape)
        assert again is not None and np.array_equal(again, rows)

    check_states(journal, tmp_path / "after", check)


def test_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qsearch.calibrate.record import StatisticsRecord

    ones = np.ones(1, np.float32)
    tensors = {"input": TensorStatistics(Histogram(0, np.ones(BINS, np.int64)), ones, ones, np.ones(1))}
    record = StatisticsRecord("m" * 64, 3, tensors, {"input": (0.0, 1.0)}, {})
    passes: list[int] = []
    monkeypatch.setattr(float_pass, "observe", lambda *_: passes.append(1) or record)
    model = types.SimpleNamespace(fingerprint="m" * 64)
    data = types.SimpleNamespace(fingerprint="d" * 64, images=lambda *_: np.zeros((3, 1, 1, 1), np.float32))

    def work(folder: Path) -> None:
        found = float_pass.float_statistics(model, data, folder, lambda clause: None)  # type: ignore[arg-type]
        assert found.content_hash == record.content_hash

    (tmp_path / "work").mkdir()
    with watched(tmp_path / "work") as journal:
        work(tmp_path / "work")
    check_states(journal, tmp_path / "after", work)
    passes.clear()
    for tree in journal.last:
        work(make(tree, tmp_path / "after"))
    assert not passes, "a cut after the pass must not cost the pass"


def test_roundings_and_sensitivities(tmp_path: Path) -> None:
    weight = QuantizedWeight(np.arange(6, dtype=np.int8).reshape(2, 3), np.ones(2, np.float32))
    table = Sensitivity({"a": ("fp32", "int8")}, ("r",), ("w",), np.ones((1, 2, 1), np.float32), np.ones((1, 2, 1), np.float32))

    def work(folder: Path) -> None:
        save_rounding(weight, folder / "roundings" / "a.npz")
        save_sensitivity(table, folder / "sensitivity" / "b.npz")

    def whole(folder: Path) -> tuple[bool, bool]:
        rounding, sensitivity = load_rounding(folder / "roundings" / "a.npz"), load_sensitivity(folder / "sensitivity" / "b.npz")
        assert rounding is None or np.array_equal(rounding[0].values, weight.values)
        assert sensitivity is None or np.array_equal(sensitivity.weight, table.weight)
        return rounding is not None, sensitivity is not None

    def check(folder: Path) -> None:
        whole(folder)
        work(folder)
        assert whole(folder) == (True, True)

    (tmp_path / "work").mkdir()
    with watched(tmp_path / "work") as journal:
        work(tmp_path / "work")
    check_states(journal, tmp_path / "after", check)
    assert all(whole(make(tree, tmp_path / "after")) == (True, True) for tree in journal.last)


def test_kept_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is there is taken for whole, so it has to be."""
    content = b"an archive" * 50
    monkeypatch.setattr(torch.export, "save", lambda program, stream, extra_files: stream.write(content))
    (tmp_path / "work").mkdir()
    with watched(tmp_path / "work") as journal:
        module_file._write(None, tmp_path / "work" / "models" / "net.pt2", {})  # type: ignore[arg-type]
    assert {tree.get("models/net.pt2", b"nothing") for _, tree in journal.states()} == {content, b"nothing"}
    assert {tree.get("models/net.pt2") for tree in journal.last} == {content}


def test_checkpoints(tmp_path: Path) -> None:
    def save(folder: Path, done: int) -> None:
        epochs = tuple(Epoch(None if index == 0 else 1.0, 50.0 + index, 1.0) for index in range(done + 1))
        CheckpointFolder(folder, {"model": "m"}).save(Checkpoint({"w": torch.full((3,), float(done))}, epochs))

    work = tmp_path / "work"
    work.mkdir()
    with watched(work) as journal, CheckpointFolder(work, {"model": "m"}).taken():
        for done in (1, 2, 3):
            save(work, done)

    def check(folder: Path) -> None:
        found = CheckpointFolder(folder, {"model": "m"}).load()
        done = 0 if found is None else found.done
        assert found is None or found.tensors["w"].tolist() == [float(done)] * 3
        save(folder, done + 1)
        again = CheckpointFolder(folder, {"model": "m"}).load()
        assert again is not None and again.done == done + 1

    check_states(journal, tmp_path / "after", check, 30)
    for tree in journal.last:
        found = CheckpointFolder(make(tree, tmp_path / "after"), {"model": "m"}).load()
        assert found is not None and found.done == 3


def sealed(folder: Path, version: int = 1) -> None:
    """The files of a bundle, as far as versions look at them."""
    (folder / "model.so").write_bytes(b"\x7fELF" + bytes([version]) * 500)
    np.save(folder / "recorded_outputs.npy", np.zeros(4, np.float32))
    (folder / "metrics.json").write_text("{}")
    rescale.write_record(folder / rescale.RECORD, {"format": rescale.FORMAT, "version": rescale.VERSION, "arrays": {}})
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    manifest: dict[str, Any] = {
        "format": runner.FORMAT,
        "target": {"arch": "", "cpu_flags": [], "description": "llvm", "threads": 1},
        "input": {"dtype": "float32", "shape": [1, 1, 28, 28]},
        "metrics": {},
        "sha256": digests,
    }
    manifest["self_sha256"] = runner.own_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "_fill", lambda folder, *_: sealed(folder))
    content = BundleContent(QuantConfig(), {}, (), {}, np.zeros(1), np.zeros(1))

    def work(folder: Path) -> None:
        write_bundle(folder / "bundles" / "7", None, None, content)  # type: ignore[arg-type]

    def check(folder: Path) -> None:
        made = folder / "bundles" / "7"
        if made.exists():
            runner.read_manifest(made)
        else:
            work(folder)
            runner.read_manifest(made)

    (tmp_path / "work").mkdir()
    with watched(tmp_path / "work") as journal:
        work(tmp_path / "work")
    check_states(journal, tmp_path / "after", check, 30)
    assert all("bundles/7/manifest.json" in tree for tree in journal.last)


def test_versions_of_a_bundle(tmp_path: Path) -> None:
    def apply(folder: Path) -> None:
        bundle = folder / "b"
        manifest, record = read_bundle(bundle)
        made = b"\x7fELF, other scales", np.ones(4, np.float32)
        replace_version(bundle, write_version(bundle, manifest, record, made, {}))

    work = tmp_path / "work"
    (work / "b").mkdir(parents=True)
    sealed(work / "b")
    seal_bundle(work / "b")
    first = (work / "b" / "manifest.json").read_bytes()
    with watched(work) as journal:
        apply(work)
        applied = len(journal.moments)
        rollback(work / "b")

    def check(folder: Path) -> None:
        # There is a whole bundle under the name at any time, and whatever lies beside it can be gone over again.
        manifest, _ = read_bundle(folder / "b")
        if version_of(manifest) == 1:
            assert (folder / "b" / "manifest.json").read_bytes() == first
            apply(folder)
        rollback(folder / "b")
        assert (folder / "b" / "manifest.json").read_bytes() == first

    check_states(journal, tmp_path / "after", check, 30)
    assert {tree["b/manifest.json"] for tree in journal.last} == {first}
    assert {json.loads(tree["b/manifest.json"] or b"")["version"] for tree in journal.after(applied - 1)} == {2}


DATABASE, LOG = "studies/demo.db", "studies/demo.db-wal"


def cut_database(journal: Journal, at: int, tree: Tree, share: float) -> Tree:
    """The tree with SQLite's own files as a cut may leave them: it syncs its log before it writes to the database.

    What was logged since then may be lost from any place on.
    """
    if DATABASE not in tree:
        return {name: content for name, content in tree.items() if name != LOG}

    def held(moment: Moment, name: str) -> bytes:
        return (moment.contents[moment.names[name]] if name in moment.names else b"") or b""

    databases = [held(moment, DATABASE) for moment in journal.moments[: at + 1]]
    changed = max((i for i in range(1, at + 1) if databases[i] != databases[i - 1]), default=0)
    log, then = held(journal.moments[at], LOG), held(journal.moments[changed], LOG)
    least = len(then) if log[:24] == then[:24] else 32
    kept = min(len(log), least + int(share * max(len(log) - least, 0)))
    return tree | {DATABASE: databases[at], LOG: log[:kept]}


def test_a_search(tmp_path: Path) -> None:
    options = ("search", "--budget", "4", "--json")
    (tmp_path / "work").mkdir()
    with watched(tmp_path / "work") as journal:
        assert invoke(tmp_path / "work", *options).exit_code == 0
    states = [(at, tree) for at, tree in journal.states() if DATABASE in tree]
    for number, (at, tree) in enumerate(some(iter(states), 4)):
        folder = make(cut_database(journal, at, tree, number / 3), tmp_path / "after")
        check_claims(folder)
        again = invoke(folder, *options)
        assert again.exit_code == 0, again.output
        trials = check_claims(folder)
        measured = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        assert len(measured) == 4 == len({trial.user_attrs["config_hash"] for trial in measured})
        assert not [trial for trial in trials if trial.state == TrialState.RUNNING]


def check_claims(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """What the study says is there is there, whole."""
    try:
        study = optuna.load_study(study_name="demo", storage=f"sqlite:///{folder}/{DATABASE}")
    except Exception:  # The cut came before the study's first transactions were on the disk.
        return []
    owners = [study._storage.get_study_system_attrs(study._study_id), *(trial.system_attrs for trial in study.get_trials())]
    for name in (key for owner in owners for key in owner if key.startswith(ARTIFACTS_ATTR_PREFIX)):
        with Image.open(folder / "studies" / "demo.artifacts" / name.removeprefix(ARTIFACTS_ATTR_PREFIX)) as image:
            image.load()
    trials = study.get_trials()
    study._storage._backend.engine.dispose()  # type: ignore[attr-defined]
    return trials
