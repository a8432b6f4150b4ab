"""The whole job as processes: search, kill, interrupt, continue, evaluate, front."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from real_search import BUDGET, SMALL, STRAYS, RealSearch, command, completed, fails, refused, start, trials, within

from qsearch.config import QuantConfig
from qsearch.errors import StudyError
from qsearch.search.evaluation.evaluator import Settings
from qsearch.search.evaluation.objective import prepare_evaluator
from qsearch.search.evaluation.remeasure import remeasure
from qsearch.search.front import measurement_from_json
from qsearch.search.loop.early_stopping import EarlyStop, StoppingRule


def test_a_killed_search_loses_and_repeats_nothing(real: RealSearch) -> None:
    after = completed(real.folder)
    assert 2 <= len(real.before) < BUDGET
    assert real.before.items() <= after.items()
    assert len(after) == BUDGET == real.document["trials"]["complete"]
    assert max(Counter(after.values()).values()) == 1
    assert not [trial for trial in trials(real.folder) if trial.state == TrialState.RUNNING]


def test_nothing_half_written_is_left(real: RealSearch) -> None:
    assert not [name for name in STRAYS if (real.folder / name).exists()]
    study = optuna.load_study(study_name="real", storage=f"sqlite:///{real.folder}/studies/real.db")
    owners = [study._storage.get_study_system_attrs(study._study_id), *(trial.system_attrs for trial in study.get_trials())]
    pictures = {key.removeprefix("artifacts:") for owner in owners for key in owner if key.startswith("artifacts:")}
    assert {file.name for file in (real.folder / "studies" / "real.artifacts").iterdir()} <= pictures
    assert len(pictures) >= BUDGET


def test_the_document_of_a_search(real: RealSearch) -> None:
    document = real.document
    assert {"study", "storage", "model", "target", "trials", "baseline", "front", "hypervolume", "seconds"} <= set(document)
    assert set(document["baseline"]) == {"latency_ms", "latency_source", "peak_bytes", "top1", "top5", "images", "metric"}
    assert document["baseline"]["top1"] > 90
    assert document["front"]
    for point in document["front"]:
        assert point["heldout"]["images"] == 6000
        assert point["top1_loss_ci_pp"][0] <= point["top1_loss_pp"] <= point["top1_loss_ci_pp"][1]
    assert min(point["peak_bytes"] for point in document["front"]) < document["baseline"]["peak_bytes"] / 2
    assert real.json("front", "--study", "real")["front"] == document["front"]


def test_a_run_in_blocks_is_a_whole_run_or_certain_to_be_needless(real: RealSearch) -> None:
    evaluator = prepare_evaluator(Settings(cache_dir=real.folder / "studies" / "cache"), lambda clause: None)
    stored = [trial for trial in trials(real.folder) if trial.state == TrialState.COMPLETE]
    evaluator.refer_to(measurement_from_json(stored[0].user_attrs["measurement"]))
    config, whole = QuantConfig.model_validate(stored[1].user_attrs["config"]), stored[1].user_attrs["measurement"]
    measured = evaluator.evaluate(config, StoppingRule({}))
    # All images in blocks: the very outputs that the search saw in one go.
    assert measured.accuracy.output_sha256 == whole["accuracy"]["output_sha256"]
    assert measured.accuracy.top1_loss_pp == whole["accuracy"]["top1_loss_pp"]
    ratio, reference_ms = measured.latency.ratio, evaluator.baseline.latency.median_ms
    assert ratio is not None and measured.latency.median_ms == pytest.approx(ratio * reference_ms)
    # Something as fast, as small and more accurate than it could be: a small part of the images is enough to know.
    with pytest.raises(EarlyStop) as stop:
        evaluator.evaluate(config, StoppingRule({0: (0.0, 0.0, -0.5)}))
    bound = stop.value.bound
    assert 0 < bound.images < measured.accuracy.images / 2
    assert bound.loss_bounds_pp is not None
    assert -0.5 <= bound.loss_bounds_pp[0] <= measured.accuracy.top1_loss_pp <= bound.loss_bounds_pp[1]


@pytest.mark.slow
def test_a_fresh_process_that_fails_says_why(real: RealSearch) -> None:
    settings = Settings(model="nowhere:Net", cache_dir=real.folder / "studies" / "cache")
    baseline = measurement_from_json(trials(real.folder)[0].user_attrs["measurement"])
    with pytest.raises(StudyError, match=r"nowhere.*the same command tries once more"):
        remeasure(settings, baseline, [QuantConfig()])


def test_front_as_a_table(real: RealSearch) -> None:
    result = command(real.folder, "front", "--study", "real")
    assert result.returncode == 0
    assert "float" in result.stdout
    assert all(f"{point['latency_ms']:.3f}" in result.stdout for point in real.document["front"])


@pytest.mark.slow
def test_evaluate(real: RealSearch) -> None:
    config = real.document["front"][0]["config"]
    (real.folder / "best.json").write_text(json.dumps(config))
    rows = real.json("evaluate", "--precision", "fp32,int8,best.json", "--split", "heldout")["rows"]
    assert [row["precision"] for row in rows] == ["fp32", "int8", "best"]
    assert {row["images"] for row in rows} == {6000}
    assert rows[1]["peak_bytes"] < rows[0]["peak_bytes"]
    assert abs(rows[1]["top1"] - rows[0]["top1"]) < 1.0
    assert rows[2]["peak_bytes"] == real.document["front"][0]["peak_bytes"]
    loss = rows[0]["top1"] - rows[2]["top1"]
    assert loss == pytest.approx(real.document["front"][0]["heldout"]["top1_loss_pp"])


@pytest.mark.slow
def test_damaged_caches_are_rebuilt(small: Path) -> None:
    options = ("evaluate", *SMALL[1:5], "--precision", "int8", "--json")
    first = within(small, *options)
    assert first.returncode == 0, first.stderr
    for suffix, size in {"so": 100, "o": 100, "lib": 0, "npy": 1000, "npz": 1000}.items():
        files = sorted((small / "studies" / "cache").rglob(f"*.{suffix}"))
        assert files
        for file in files[:: max(1, len(files) // 3)]:
            # Not in place: this process may have the library loaded, and would lose the ground it stands on.
            damaged = file.with_name("damaged")
            damaged.write_bytes(file.read_bytes()[:size])
            damaged.replace(file)
    again = command(small, *options)
    assert again.returncode == 0, again.stderr
    one, other = (json.loads(result.stdout)["rows"][0] for result in (first, again))
    assert {key: one[key] for key in ("top1", "top5", "peak_bytes")} == {
        key: other[key] for key in ("top1", "top5", "peak_bytes")
    }
    assert "float pass over" in again.stderr


@pytest.mark.slow
def test_interrupt_timeout_and_a_larger_budget(small: Path) -> None:
    options = (*SMALL[:-1], "other", "--budget")
    process = start(small, *options, "50000")
    pictures = small / "studies" / "other.artifacts"
    while process.poll() is None and len(list(pictures.glob("*"))) < 3:
        time.sleep(0.01)
    # Two searches of one study at once: the second is refused while the first runs.
    fails(small, 1, (f"process {process.pid}", "--study"), *options, "3")
    process.send_signal(signal.SIGINT)
    out, words = process.communicate()
    assert process.returncode == 130, words
    assert out == ""
    assert "Traceback" not in words
    done = completed(small, "other")
    assert f"intact with {len(done)} measured trials" in words
    late = within(small, *options, "50000", "--timeout", "0", "--json")
    assert late.returncode == 0, late.stderr
    assert f"time is up after {len(done)} of 50000" in late.stderr
    assert json.loads(late.stdout)["trials"]["complete"] == len(done)
    more = within(small, *options, str(len(done) + 2), "--json")
    assert json.loads(more.stdout)["trials"]["complete"] == len(done) + 2
    again = within(small, *options, str(len(done) + 2), "--json")
    assert json.loads(again.stdout)["trials"] == json.loads(more.stdout)["trials"]
    after = completed(small, "other")
    assert done.items() <= after.items()
    assert len(set(after.values())) == len(after)


def test_another_search_is_refused(small: Path) -> None:
    before = completed(small, "small")
    options = (*SMALL, "--budget", "9")
    fails(small, 1, ("space was 'default'", "performance_optimized", "--study"), *options, "--space", "performance_optimized")
    fails(small, 1, ("data was", "seed 0", "seed 1"), *options, "--seed", "1")
    fails(small, 1, ("target was 'llvm", "generic (portable"), *options, "--target", "portable")
    assert completed(small, "small") == before


@pytest.mark.slow
def test_no_compiler(small: Path, tmp_path: Path) -> None:
    # The kernels are in the cache; a bundle must be linked all the same.
    result = command(small, "export", "--study", "small", "--out", "nothing", PATH=str(tmp_path))
    refused(result, 1, "C++ compiler", "install g++")
    assert not (small / "nothing").exists()


def test_export_from_another_folder(small: Path, tmp_path: Path) -> None:
    storage = f"sqlite:///{small}/studies/small.db"
    result = within(tmp_path, "export", "--study", "small", "--storage", storage, "--out", "bundle", "--json")
    assert result.returncode == 0, result.stderr
    # Kernels and images come from where the study was searched.
    assert [file.name for file in tmp_path.iterdir()] == ["bundle"]
