"""What is exported is what was scored: a study whose kernels have changed is not continued, nor exported in silence."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_search import SMALL, fails, within

from qsearch.build.tiles import TileChoices
from qsearch.config import named_config
from qsearch.errors import BundleError
from qsearch.export import from_study
from qsearch.kernels.cpu import candidate_tiles
from qsearch.report.documents import settings_of
from qsearch.search.evaluation.objective import ModelEvaluator, prepare_evaluator
from qsearch.search.front import float_point, study_front
from qsearch.search.study import StudyHandle, load_study

EXPORT = ("export", "--study", "small", "--json")


def study_of(folder: Path) -> StudyHandle:
    """The small study."""
    return load_study("small", f"sqlite:///{folder}/studies/small.db")


def evaluator_of(folder: Path) -> ModelEvaluator:
    """What the small study searched."""
    return prepare_evaluator(settings_of(study_of(folder)), lambda clause: None)


def exported(folder: Path, out: Path, *options: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Export one bundle: the row that is printed, and its metrics."""
    result = within(folder, *EXPORT, "--out", str(out), *options)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)["bundles"]
    return row, json.loads((out / "metrics.json").read_text())


@pytest.fixture
def retuned(small: Path) -> Iterator[Path]:
    """The small study after tuning has found other tiles; in the end it has not."""
    evaluator, written = evaluator_of(small), set()
    choices = TileChoices(evaluator.linker.cache.directory, evaluator.target)
    for config in map(named_config, ("fp32", "int8")):
        for op in evaluator.lower(config).ops:
            tiles = candidate_tiles(op.key, evaluator.target.isa, 1, 2)
            if len(tiles) > 1:
                choices.put(op.key, tiles[1])
                written.add(choices.directory / f"{choices.name(op.key)}.json")
    assert written
    yield small
    for file in written:
        file.unlink()


@pytest.fixture
def old(small: Path, tmp_path: Path) -> str:
    """The small study as a version of qsearch that recorded no kernels would have left it."""
    shutil.copyfile(small / "studies" / "small.db", tmp_path / "old.db")
    with sqlite3.connect(tmp_path / "old.db") as database:
        for statement in (
            "UPDATE trial_user_attributes SET value_json = json_remove(value_json, '$.kernels_sha256') WHERE key = 'measurement'",
            "UPDATE study_user_attributes SET value_json = json_remove(value_json, '$.parts.kernels') WHERE key = 'identity'",
        ):
            assert database.execute(statement).rowcount > 0
    database.close()
    return f"sqlite:///{tmp_path}/old.db"


def test_a_trial_is_exported_with_the_kernels_it_was_measured_with(small: Path, tmp_path: Path) -> None:
    evaluator, front = evaluator_of(small), study_front(study_of(small).study)
    for point in front:
        assert point.measurement.kernels_sha256 == evaluator.kernels_sha256(point.config)
    row, metrics = exported(small, tmp_path / "bundle")
    (point,) = (point for point in front if point.trial == row["trial"])
    assert row["remeasured"] is False
    assert metrics["search"] == json.loads(json.dumps(point.measurement.to_json()))
    assert "remark" not in metrics


def test_other_tiles_end_a_study_and_are_measured_again_on_request(retuned: Path, tmp_path: Path) -> None:
    fails(retuned, 1, ("kernels was", "`tune` has chosen other tiles", "--study"), *SMALL, "--budget", "5")
    words = ("trial", "measured with other kernels", "`tune`", "--remeasure", "--study")
    fails(retuned, 1, words, *EXPORT, "--all", "--out", str(tmp_path / "all"))
    assert not (tmp_path / "all").exists()
    front = study_front(study_of(retuned).study)
    row, metrics = exported(retuned, tmp_path / "bundle", "--remeasure")
    (point,) = (point for point in front if point.trial == row["trial"])
    assert row["remeasured"] is True
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["metrics"] == {"latency_ms": metrics["latency_ms"], "remark": metrics["remark"]}
    assert "measured again" in metrics["remark"] and point.measurement.kernels_sha256[:12] in metrics["remark"]
    assert metrics["search"]["kernels_sha256"] == evaluator_of(retuned).kernels_sha256(point.config)
    assert metrics["search"]["kernels_sha256"] != point.measurement.kernels_sha256
    assert metrics["search"]["latency"]["median_ms"] == metrics["latency_ms"] != point.measurement.latency.median_ms
    assert metrics["heldout"]["images"] == point.heldout.accuracy.images  # type: ignore[union-attr]
    checked = json.loads(within(tmp_path, "verify", str(tmp_path / "bundle"), "--json").stdout)
    assert checked["mismatching_bits"] == 0 and checked["recorded_latency_ms"] == metrics["latency_ms"]
    assert "alone" in checked["timing"] and "in turns with the float module" in checked["recorded_timing"]
    words = within(tmp_path, "verify", str(tmp_path / "bundle")).stderr
    assert "in turns with the float module" in words and "the two do not compare" in words


def test_a_study_of_unrecorded_kernels_is_treated_as_one_of_others(small: Path, old: str, tmp_path: Path) -> None:
    options = ("--storage", old)
    fails(small, 1, ("kernels was 'nothing'", "--study"), *SMALL, *options, "--budget", "5")
    fails(small, 1, ("before qsearch recorded", "--remeasure"), *EXPORT, *options, "--out", str(tmp_path / "bundle"))
    row, metrics = exported(small, tmp_path / "bundle", *options, "--remeasure")
    assert row["remeasured"] and "unknown" in metrics["remark"]


def test_tuning_leaves_a_study_that_has_begun_as_it_is(small: Path) -> None:
    result = within(small, *SMALL, "--budget", "4", "--tune", "30", "--json")
    assert result.returncode == 0, result.stderr
    assert "study small has begun" in result.stderr
    assert not list((small / "studies" / "cache" / "kernels").glob("tile_*"))


def test_float_is_named_where_its_kernels_have_changed(retuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsearch.search.front.beats_float", lambda front, baseline: False)
    fails(retuned, 1, ("the float module: measured with other kernels", "--remeasure"), *EXPORT, "--out", str(tmp_path / "no"))
    result = within(retuned, *EXPORT, "--out", str(tmp_path / "float"), "--remeasure")
    assert result.returncode == 0, result.stderr
    assert "measuring the float module again" in result.stderr
    (row,) = json.loads(result.stdout)["bundles"]
    assert row["trial"] is None and row["remeasured"]


def test_outputs_that_have_changed_name_float_as_well(small: Path) -> None:
    (point, *_) = study_front(study_of(small).study)
    in_float = float_point(point.measurement)
    for one, name in ((point, f"trial {point.trial}"), (in_float, "the float module")):
        with pytest.raises(BundleError, match=f"^{name} built now gives other outputs"):
            from_study._check_outputs(one, np.zeros((1, 2), np.float32))


def test_float_is_exported_where_nothing_beats_it(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsearch.search.front.beats_float", lambda front, baseline: False)
    row, metrics = exported(small, tmp_path / "float")
    assert row["trial"] is None and not row["remeasured"]
    assert metrics["trial"] is None
    assert metrics["search"] == metrics["float"]
    verified = within(small, "verify", str(tmp_path / "float"))
    assert verified.returncode == 0, verified.stderr
    # Alone now and alone then: these two figures compare.
    assert verified.stderr.count("timed alone") == 2 and "do not compare" not in verified.stderr
    everything = within(small, "export", "--study", "small", "--out", str(tmp_path / "all"), "--all", "--json")
    assert everything.returncode == 0, everything.stderr
    assert "float itself is exported" in everything.stderr
    assert [path.name for path in (tmp_path / "all").iterdir()] == ["float"]
