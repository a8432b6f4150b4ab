"""The comparison of samplers, on a network whose measurements are formulas."""

import json
from dataclasses import replace

import numpy as np
import pytest
from analytic import AnalyticEvaluator
from campaign import fill, kept_run, measure_all
from curves_plot import draw_curves
from measured import MeasuredFolder
from problems import FloatRun, Problem
from search import compare
from stopping import compare_one, summary

from qsearch.search.bound_space import bind_space
from qsearch.search.space import SearchSpace

IMAGES = 200
SPACE = {"version": 1, "name": "two modes", "calibration": {"modes": ["max", "mse"]}, "granularities": ["channel_wise"]}


class Source(AnalyticEvaluator):
    """The analytic network, with answers to images that agree with its losses."""

    def measure(self, config):
        measurement = self.evaluate(config)
        lost = min(round(measurement.accuracy.top1_loss_pp * IMAGES / 100), IMAGES)
        accuracy = replace(measurement.accuracy, top1_loss_pp=100 * lost / IMAGES, images=IMAGES)
        return replace(measurement, accuracy=accuracy), np.arange(IMAGES) >= lost


@pytest.fixture
def source():
    return Source(layers=5)


@pytest.fixture
def problem(source, tmp_path):
    def no_tables():
        raise AssertionError("only the planner needs tables")

    space = bind_space(SearchSpace.model_validate(SPACE), source.graph)
    labels = np.arange(IMAGES) % 4
    # Float has all images right, by margins that grow.
    logits = np.eye(4, dtype=np.float32)[labels] * (1 + np.arange(IMAGES, dtype=np.float32))[:, None]
    measured = MeasuredFolder(tmp_path / "measured", source.measure)
    return Problem("analytic", space, source.baseline, measured, tmp_path, no_tables, FloatRun(logits, labels))


def test_samplers_are_compared_with_all_that_is_known(problem, source):
    measure_all(problem)
    distinct = len(source.measured)
    assert distinct == len(set(source.measured)) == 2 * 2**5 - 1
    document, curves = compare(problem, ["random", "random-plain"], seeds=2, trials=25)
    assert len(source.measured) == distinct, "measured twice"
    assert document["reference"]["configurations"] == distinct
    rows = {(row["sampler"], row["trials"]): row for row in document["results"]}
    assert set(rows) == {(name, trials) for name in ("random", "random-plain") for trials in (10, 20, 25)}
    for name in ("random", "random-plain"):
        found = [rows[name, trials] for trials in (10, 20, 25)]
        assert 0 < found[0]["hypervolume_pct_mean"] <= found[1]["hypervolume_pct_mean"] <= found[2]["hypervolume_pct_mean"] <= 100
        assert found[0]["seconds"] < found[2]["seconds"]
    # All the plain starting points are the same for every seed.
    assert rows["random", 10]["hypervolume_pct_std"] == 0 < rows["random-plain", 10]["hypervolume_pct_std"]
    picture = np.asarray(draw_curves(curves, document))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 4
    json.dumps(document)


def test_measurements_outlive_their_process(problem, source, tmp_path):
    run = kept_run(problem, "nsgaii", seed=3, trials=6)
    (file,) = (tmp_path / "measured").glob("*.jsonl")
    kept = file.read_text()
    # What a killed process leaves behind.
    file.write_text(kept + kept.splitlines()[0][:80])
    again = MeasuredFolder(tmp_path / "measured", source.measure)
    assert list(again.known) == run.digests
    for digest, found in problem.measured.known.items():
        read = again.known[digest]
        assert (read.config, read.measurement, read.cpu_s) == (found.config, found.measurement, found.cpu_s)
        assert np.array_equal(read.right, found.right)
    problem.measured = again
    before = len(source.measured)
    assert kept_run(problem, "nsgaii", seed=3, trials=4).digests == run.digests[:4]
    assert len(source.measured) == before


def test_a_noisy_measurement_gives_way_to_a_better_one(problem, source):
    config = problem.space.config({})
    quiet = source.measure(config)[0]
    noisy = replace(quiet, latency=replace(quiet.latency, median_ms=1.0, noisy=True))
    problem.measured.measure = lambda config: (noisy, None)
    assert problem.measured.evaluate(config).measurement == noisy
    problem.measured.measure = source.measure
    assert problem.measured.remeasure(config).measurement == quiet
    problem.measured.measure = lambda config: (noisy, None)
    assert problem.measured.remeasure(config).measurement == quiet


def test_filling_measures_new_configurations_only(problem, source):
    fill(problem, 20)
    assert len(problem.measured.known) == len(source.measured) == len(set(source.measured)) == 20
    fill(problem, 1000)
    assert len(problem.measured.known) == 2 * 2**5 - 1, "the space holds no more"


def test_early_stopping_keeps_the_front_at_fewer_images(problem, source):
    rows = [compare_one(problem, "random-plain", seed, 25) for seed in (0, 1)]
    for row in rows:
        assert row["trials"] == 25 and row["stopped_early"] > 0
        assert 0 < row["images_share"] < 1
        # The random sampler learns nothing from trials, so that both searches try the same.
        assert row["hypervolume_pct"] == pytest.approx(100)
    (found,) = summary(rows)
    assert found["seeds"] == 2 and found["images_share_mean"] <= found["images_share_max"]
