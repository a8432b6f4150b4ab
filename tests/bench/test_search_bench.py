"""The comparison of samplers, on a network whose measurements are formulas."""

import json
from dataclasses import replace

import campaign
import moocore
import numpy as np
import pytest
import verdicts as verdicts_of
from analytic import AnalyticEvaluator, plain_settings
from campaign import NEAR, TIMINGS, Run, fill, front_of, kept_run, measure_all, settle
from curves_plot import draw_curves
from fresh_timings import fresh_results, time_fronts
from measured import Answers, MeasuredFolder
from problems import FloatRun, Problem, TimedTables
from search import compare, made_runs
from stopping import compare_one, summary
from verdicts import Curves, curves_of, reference_hypervolume, verdicts

from qsearch.measure.measurement import Latency
from qsearch.search.bound_space import bind_space
from qsearch.search.opening import choose_opening, opening_setting, uniform_anchors
from qsearch.search.space import SearchSpace
from qsearch.search.tables.cost import Cost
from qsearch.search.tables.layer_tables import Tables
from qsearch.search.tables.pairwise import PairwiseSum

IMAGES, FLOAT_MS = 200, 10.0
OPENING_SECONDS, PARTS_SECONDS = 5.0, (7.0, 10.0)
SPACE = {"version": 1, "name": "two modes", "calibration": {"modes": ["max", "mse"]}, "granularities": ["channel_wise"]}


class Source(AnalyticEvaluator):
    """The analytic network, with answers to images that agree with its losses."""

    timed: Latency | None = None

    def time(self, config):
        return self.timed or self._measure(config).latency

    def measure(self, config):
        measurement = self.evaluate(config)
        lost = min(round(measurement.accuracy.top1_loss_pp * IMAGES / 100), IMAGES)
        accuracy = replace(measurement.accuracy, top1_loss_pp=100 * lost / IMAGES, images=IMAGES, divergence=lost / 5000)
        right = np.arange(IMAGES) >= lost
        # Every configuration has kernels of its own.
        measurement = replace(measurement, accuracy=accuracy, kernels_sha256=config.content_hash())
        return measurement, Answers(right, np.where(right, 0.0, IMAGES / 5000).astype(np.float32))

    def _tables(self, space):
        """Tables of the true costs of single layers, which add up."""

        def effect(value, setting):
            alone = [space.config({**setting, layer.name: "int8"}) for layer in space.layers]
            none = value(self.baseline)
            found = [value(self._measure(config)) - none for config in alone]
            return PairwiseSum(tuple(np.array([none / len(alone), none / len(alone) + one]) for one in found), {})

        def cost(config):
            found = self._measure(config)
            return Cost(found.latency.median_ms, found.memory.peak_bytes)

        def divergence(config):
            return effect(lambda found: found.accuracy.top1_loss_pp / 25, {"calibration": config.calibration.mode})

        latency = effect(lambda found: found.latency.median_ms, {})
        weights = effect(lambda found: float(found.memory.weight_bytes), {})
        return Tables(latency, weights, divergence, cost, self.baseline, plain_settings(space))


@pytest.fixture
def source():
    return Source(layers=5)


@pytest.fixture
def problem(source, tmp_path):
    space = bind_space(SearchSpace.model_validate(SPACE), source.graph)
    labels = np.arange(IMAGES) % 4
    # Float has all images right, by margins that grow.
    logits = np.eye(4, dtype=np.float32)[labels] * (1 + np.arange(IMAGES, dtype=np.float32))[:, None]
    measured = MeasuredFolder(tmp_path / "measured", source, FLOAT_MS)

    def tables():
        draft = source.draft(space, opening_setting(space))
        opening = choose_opening(space, draft.cost, source.baseline)
        made = [lambda tried: draft.tables(), lambda tried: source.tables(space, mixed=False, tried=tried)]
        parts = list(zip(made, PARTS_SECONDS, strict=True))
        return TimedTables(uniform_anchors(space), opening, parts, OPENING_SECONDS)

    return Problem("analytic", space, source.baseline, measured, tmp_path, tables, FloatRun(logits, labels))


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
        assert (
            0
            < found[0]["hypervolume_pct_mean"]
            <= found[1]["hypervolume_pct_mean"]
            <= found[2]["hypervolume_pct_mean"]
            <= 100 + 1e-9
        )
        assert found[0]["seconds"] < found[2]["seconds"]
    # All the starting points are the same for every seed.
    assert rows["random", 10]["hypervolume_pct_std"] == 0 < rows["random-plain", 10]["hypervolume_pct_std"]
    picture = np.asarray(draw_curves(curves, document))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 4
    json.dumps(document)


def test_what_runs_found_between_them_is_less_than_all_that_is_known(problem):
    measure_all(problem)
    document, _ = compare(problem, ["random-plain"], seeds=1, trials=20)
    reference, (first, last) = document["reference"], document["results"]
    assert reference["of_runs"]["configurations"] == 20 and reference["of_runs"]["hypervolume"] < reference["hypervolume"]
    assert last["hypervolume_pct_mean"] < 100 and last["hypervolume_pct_of_runs_mean"] == pytest.approx(100)
    assert first["hypervolume_pct_mean"] < first["hypervolume_pct_of_runs_mean"] < 100


def test_the_planner_is_charged_for_its_tables(problem, monkeypatch):
    drafted = 12
    for module in (campaign, verdicts_of):
        monkeypatch.setattr(module, "drafted_trials", lambda space: drafted)
    measure_all(problem)
    document, curves = compare(problem, ["planner", "random-plain", "random"], seeds=1, trials=50)
    assert document["tables_seconds"] == {"of_opening": OPENING_SECONDS, "of_parts": list(PARTS_SECONDS)}
    first = len(problem.tables().first)
    opening = first + len(problem.tables().opening)
    begun = (first, opening, drafted)
    assert 0 < first < opening < drafted and curves["planner"].begun == begun
    seconds = curves["planner"].seconds[0]
    for before, spent in zip(begun, np.cumsum([0.0, OPENING_SECONDS, *PARTS_SECONDS[:-1]]), strict=True):
        assert spent < seconds[before - 1] < spent + 5.0
    for before, spent in zip(begun, np.cumsum([OPENING_SECONDS, *PARTS_SECONDS]), strict=True):
        assert seconds[before] > spent
    # Its tables are exact here, and the network is short.
    found = document["verdicts"]
    assert found["trials_to_equal_random"] <= 20
    (by_trials, _), (*made, by_time, _) = found["at_equal_trials"], found["at_equal_time"]
    assert max(by_trials["hypervolume_pct"].values()) - 1e-9 <= by_trials["hypervolume_pct"]["planner"] > 99
    assert by_time["seconds"] > OPENING_SECONDS + sum(PARTS_SECONDS)
    for trials, one in zip(begun, made, strict=True):
        assert one["planner_trials"] == trials and one["seconds"] == pytest.approx(seconds[trials], abs=1e-5)
        assert one["hypervolume_pct"]["planner"] == curves["planner"].percent[0, trials - 1]
    assert set(by_time["runs_over"]) == {"random", "random-plain"}, "formulas take no time"


@pytest.mark.parametrize("percent, ahead", [(79.0, False), (80.0, False), (81.0, True)])
def test_the_planner_is_ahead_of_the_others_or_is_not(percent, ahead):
    def constant(level):
        return Curves(np.full((2, 25), level), np.arange(1.0, 26.0) * np.ones((2, 1)))

    found = verdicts({"planner": constant(percent), "random": constant(70.0), "tpe": constant(80.0)})
    for (one,) in (found["at_equal_trials"], found["at_equal_time"]):
        assert one["planner_ahead"] is ahead


def test_measurements_outlive_their_process(problem, source, tmp_path):
    run = kept_run(problem, "nsgaii", seed=3, trials=6)
    (file,) = (tmp_path / "measured").glob("*.jsonl")
    kept = file.read_text()
    # What a killed process leaves behind.
    file.write_text(kept + kept.splitlines()[0][:80])
    again = MeasuredFolder(tmp_path / "measured", source, FLOAT_MS)
    assert list(again.known) == run.digests
    for digest, found in problem.measured.known.items():
        read = again.known[digest]
        assert (read.config, read.measurement, read.cpu_s) == (found.config, found.measurement, found.cpu_s)
        assert np.array_equal(read.answers.right, found.answers.right)
        assert np.array_equal(read.answers.nats, found.answers.nats)
    problem.measured = again
    before = len(source.measured)
    assert kept_run(problem, "nsgaii", seed=3, trials=4).digests == run.digests[:4]
    assert len(source.measured) == before


def test_answers_that_an_older_record_lacks_are_made_up_for(problem, source, tmp_path):
    config = problem.space.config({})
    found = problem.measured.evaluate(config)
    (file,) = (tmp_path / "measured").glob("*.jsonl")
    line = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in line.items() if name != "nats"}) + "\n")
    old = MeasuredFolder(tmp_path / "measured", source, FLOAT_MS)
    assert old.evaluate(config).answers is None
    source.measured.clear()
    old.with_answers(config)
    for folder in (old, MeasuredFolder(tmp_path / "measured", source, FLOAT_MS)):
        assert np.array_equal(folder.with_answers(config).answers.nats, found.answers.nats)
        assert folder.evaluate(config).measurement == found.measurement
    assert len(source.measured) == 1


def test_the_middle_of_several_timings_counts(problem, source, tmp_path):
    config = problem.space.config({})
    digest, once = config.content_hash(), problem.measured.evaluate(config).measurement.latency
    times = [0.1, once.median_ms + 1, once.median_ms + 2]
    for ms in times:
        source.timed = replace(once, median_ms=ms, noisy=ms < 1)
        problem.measured.time_again(config)
    for measured in (problem.measured, MeasuredFolder(tmp_path / "measured", source, FLOAT_MS)):
        assert measured.timings(digest) == 4
        assert measured.known[digest].measurement.latency.median_ms == once.median_ms + 1, "the noisy one does not count"


def test_what_runs_the_same_instructions_shares_its_timings(problem, source, tmp_path, monkeypatch):
    """Another mode of calibration changes constants alone."""
    measure = source.measure

    def with_kernels(config):
        measurement, answers = measure(config)
        return replace(measurement, kernels_sha256="".join(config.precision.values())), answers

    monkeypatch.setattr(source, "measure", with_kernels)
    layer = problem.space.layers[0].name
    one, twin, other = (problem.space.config(values) for values in ({layer: "int8"}, {layer: "int8", "calibration": "mse"}, {}))
    latency = problem.measured.evaluate(one).measurement.latency
    for config in (twin, other):
        problem.measured.evaluate(config)
    source.timed = replace(latency, median_ms=latency.median_ms + 1)
    for _ in range(3):
        problem.measured.time_again(twin)
    for measured in (problem.measured, MeasuredFolder(tmp_path / "measured", source, FLOAT_MS)):
        digests = [config.content_hash() for config in (one, twin, other)]
        assert [measured.timings(digest) for digest in digests] == [5, 5, 1]
        found = [measured.known[digest].measurement.latency.median_ms for digest in digests]
        assert found[:2] == [latency.median_ms + 1] * 2
        assert latency.median_ms < found[2] < latency.median_ms + 1


def test_latencies_are_told_on_one_clock(problem, source, tmp_path):
    config = problem.space.config({})
    latency = problem.measured.evaluate(config).measurement.latency
    source.timed = replace(latency, median_ms=0.9 * 4.0, spread_ms=0.4, ratio=0.9)
    for _ in range(3):
        problem.measured.time_again(config)
    again = MeasuredFolder(tmp_path / "measured", source, 2.0).known[config.content_hash()].measurement.latency
    assert (again.median_ms, again.spread_ms) == (pytest.approx(1.8), pytest.approx(0.2))


def test_settling_undoes_luck(problem, source):
    measure_all(problem)
    front = reference_hypervolume(problem)
    lucky = problem.space.config({layer.name: "int8" for layer in problem.space.layers})
    found = problem.measured.known.pop(lucky.content_hash())
    latency = replace(found.measurement.latency, median_ms=found.measurement.latency.median_ms / 2)
    problem.measured.known[lucky.content_hash()] = replace(found, measurement=replace(found.measurement, latency=latency))
    assert reference_hypervolume(problem) > front
    settle(problem)
    counts = {digest: problem.measured.timings(digest) for digest in problem.measured.known}
    objectives = np.array([problem.measured.known[digest].objectives for digest in counts])
    kept = objectives[moocore.is_nondominated(objectives)]

    def may_be_on_it(own, count):
        """If its timings, all alike here, were as unlucky as so many may be."""
        return not (kept < own * (1.0 - NEAR / count**0.5, 1.0, 1.0)).all(axis=1).any()

    for (digest, count), own in zip(counts.items(), objectives, strict=True):
        enough = next((k for k in range(1, TIMINGS) if not may_be_on_it(own, k)), TIMINGS)
        assert count == enough, problem.measured.known[digest].config
    assert counts[lucky.content_hash()] == TIMINGS and min(counts.values()) == 1, "what is far off needs no more"
    assert reference_hypervolume(problem) == pytest.approx(front)
    settle(problem, at_least=3)
    assert {digest: problem.measured.timings(digest) for digest in counts} == {d: max(n, 3) for d, n in counts.items()}


def test_what_a_run_has_on_its_front_is_settled_however_far_behind(problem, monkeypatch):
    measure_all(problem)
    run = kept_run(problem, "random-plain", 0, 8)
    own = np.array([problem.measured.known[digest].objectives for digest in run.digests])
    front = {digest for digest, keep in zip(run.digests, moocore.is_nondominated(own), strict=True) if keep}
    monkeypatch.setattr(campaign, "_near_front", lambda problem: [])
    settle(problem)
    assert {digest for digest in problem.measured.known if problem.measured.timings(digest) >= TIMINGS} == front


def test_only_rounds_that_timed_all_value_a_front(problem, source, monkeypatch):
    measure_all(problem)
    document, _ = compare(problem, ["random"], seeds=2, trials=25)
    assert all(row["fresh_rounds"] == 0 and "hypervolume_pct_fresh_mean" not in row for row in document["results"])
    runs = {"random": made_runs(problem, ["random"], 1, 25)["random"]}
    time_fronts(problem, runs, 2)
    (file,) = (problem.folder / "fresh").iterdir()
    # One is killed in the middle of a round, another in the middle of a line.
    monkeypatch.setattr(source, "time", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        time_fronts(problem, runs, 9)
    with file.open("a") as stream:
        stream.write(file.read_text()[:40])
    fresh = fresh_results(problem, runs)
    assert {key: row["fresh_rounds"] for key, row in fresh.items()} == {("random", count): 2 for count in (10, 20, 25)}
    plain = curves_of(problem, runs["random"])
    for (_, count), row in fresh.items():
        assert row["hypervolume_pct_fresh_mean"] == pytest.approx(plain.at_trial(count).mean()), "here timings never differ"
    behind = [digest for digest in problem.measured.known if digest not in front_of(problem, problem.measured.known)]
    other = {"other": [Run("other", 0, behind[:10], [0.0] * 10)]}
    assert fresh_results(problem, runs | other) == fresh | {("other", 10): {"fresh_rounds": 0}}


def test_timings_that_picked_nothing_take_the_luck_out(problem, source, monkeypatch):
    """All configurations are worth the same, whatever their timings say."""
    rng, float_ms = np.random.default_rng(0), problem.baseline.latency.median_ms
    one, answers = source.measure(problem.space.config({}))

    def timed(config=None):
        return replace(one.latency, median_ms=0.5 * float_ms * float(np.exp(rng.normal(0, 0.05))))

    def measure(config):
        memory = replace(one.memory, weight_bytes=0)
        return replace(one, latency=timed(), memory=memory, kernels_sha256=config.content_hash()), answers

    monkeypatch.setattr(source, "time", timed)
    monkeypatch.setattr(source, "measure", measure)
    measure_all(problem)
    for found in list(problem.measured.known.values()):
        for _ in range(7):
            problem.measured.time_again(found.config)
    known = list(problem.measured.known)
    runs = [Run("some", seed, rng.permutation(known)[:10].tolist(), [0.0] * 10) for seed in range(20)]
    plain = curves_of(problem, runs).at_trial(10)
    time_fronts(problem, {"some": runs}, 400)
    ((_, fresh),) = fresh_results(problem, {"some": runs}).items()
    assert fresh["fresh_rounds"] == 400
    assert plain.mean() < 99 < fresh["hypervolume_pct_fresh_mean"] < 101


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
