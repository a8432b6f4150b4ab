"""Early stopping on images: certain outcomes only, kept apart from measurements, counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from analytic import AnalyticEvaluator, invoke
from optuna.trial import TrialState

from qsearch.config import QuantConfig
from qsearch.measure.accuracy import compare_accuracy, mean_divergence
from qsearch.measure.image_blocks import ImageHistory, Seen, loss_bounds
from qsearch.measure.measurement import Measurement
from qsearch.search.bound_space import bind_space
from qsearch.search.constraints import Constraints
from qsearch.search.front import hypervolume, study_front
from qsearch.search.loop.driver import Limits, SearchProblem, run_search
from qsearch.search.loop.early_stopping import EarlyStop, StoppingRule
from qsearch.search.samplers import make_sampler
from qsearch.search.space import load_space
from qsearch.search.study import Identity, StudyHandle, load_study, study_to_search
from qsearch.search.study_trials import finished, measured_trials

LABELS = np.random.default_rng(5).integers(0, 7, 900)
# Right on nine images of ten, by a margin of about two.
FLOAT = (np.random.default_rng(6).normal(size=(900, 7)) + 2.6 * np.eye(7)[LABELS]).astype(np.float32)


@pytest.fixture
def handle(tmp_path: Path) -> Iterator[StudyHandle]:
    """An empty study."""
    with study_to_search("demo", Identity({"model": "a"}), f"sqlite:///{tmp_path}/study.db") as opened:
        opened.study.sampler = make_sampler("random", 0, 0)
        yield opened


def problem(evaluator: AnalyticEvaluator, constraints: Constraints = Constraints()) -> SearchProblem:
    """The default space with early stopping."""
    space = bind_space(load_space("default"), evaluator.graph)
    return SearchProblem(space, evaluator.evaluate, constraints=constraints, early_stopping=True)


def run(history: ImageHistory, logits: np.ndarray, look: Callable[[Seen], None] = lambda seen: None) -> np.ndarray:
    """One run over all images."""
    blocks = history.blocks()
    return history.run(blocks, (logits[block] for block in blocks), look)


def disturbed(noise: float, seed: int = 0) -> np.ndarray:
    """Logits of a module that is off by as much."""
    return FLOAT + np.random.default_rng(seed).normal(0, noise, FLOAT.shape).astype(np.float32)


def test_blocks_begin_with_what_float_has_wrong_and_go_on_by_its_margin() -> None:
    blocks = ImageHistory(FLOAT, LABELS).blocks()
    np.testing.assert_array_equal(np.sort(np.concatenate(blocks)), np.arange(900))
    wrong = FLOAT.argmax(1) != LABELS
    np.testing.assert_array_equal(blocks[0], np.flatnonzero(wrong))
    two = np.sort(FLOAT, axis=1)
    margin = two[:, -1] - two[:, -2]
    for one, following in zip(blocks[1:], blocks[2:], strict=False):
        assert margin[one].max() <= margin[following].min()
    assert [len(block) for block in ImageHistory(FLOAT[~wrong][:3], LABELS[~wrong][:3]).blocks()] == [1, 1, 1]


@pytest.mark.parametrize("batch", [2, 7, 128, 1000])
def test_blocks_are_whole_batches_but_for_the_last(batch: int) -> None:
    blocks = ImageHistory(FLOAT, LABELS).blocks(batch)
    np.testing.assert_array_equal(np.sort(np.concatenate(blocks)), np.arange(900))
    assert all(len(block) and len(block) % batch == 0 for block in blocks[:-1])
    assert set(np.flatnonzero(FLOAT.argmax(1) != LABELS)) <= set(blocks[0].tolist())


def test_what_earlier_runs_lost_comes_first() -> None:
    history = ImageHistory(FLOAT, LABELS)
    # Lost by all, by half, and by none of them, though float's margin is least there.
    always, often, never = np.flatnonzero(FLOAT.argmax(1) == LABELS)[np.argsort(history.margin[history.float_right])[[-1, -2, 0]]]
    for seed in range(4):
        logits = FLOAT.copy()
        logits[always, LABELS[always]] -= 100
        logits[often, LABELS[often]] -= 100 * (seed % 2)
        np.testing.assert_array_equal(run(history, logits), logits)
    order = [next(n for n, block in enumerate(history.blocks()) if image in block) for image in (always, often, never)]
    assert order == [1, 1, 1]
    np.testing.assert_array_equal(history.blocks()[0], np.flatnonzero(FLOAT.argmax(1) != LABELS))
    assert history.lost[always] == 4 and history.lost[often] == 2 and history.lost.sum() == 6


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0, 10.0])
def test_limits_hold_at_every_look_and_a_whole_run_gives_the_same_logits(noise: float) -> None:
    history, logits = ImageHistory(FLOAT, LABELS), disturbed(noise)
    final = compare_accuracy(logits, FLOAT, LABELS).top1_loss_pp
    looks: list[Seen] = []
    ends = list(np.cumsum([len(block) for block in history.blocks()]))
    np.testing.assert_array_equal(run(history, logits, looks.append), logits)
    assert [seen.images for seen in looks] == ends[:-1]
    lows, highs = np.array([seen.loss_bounds_pp for seen in looks]).T
    assert (lows <= final + 1e-9).all() and (final - 1e-9 <= highs).all()
    # They only ever close in; of a slightly disturbed network little is left to know after a third of the images.
    assert (np.diff(lows) >= -1e-9).all() and (np.diff(highs) <= 1e-9).all()
    if noise == 0.1:
        assert final - lows[next(n for n, seen in enumerate(looks) if seen.images > 300)] < 0.5


def test_a_run_like_others_tells_its_loss_earlier_than_the_first() -> None:
    history, after = ImageHistory(FLOAT, LABELS), []
    for seed in range(12):
        looks: list[Seen] = []
        logits = disturbed(1.0) + 0.2 * disturbed(1.0, 1 + seed) - 0.2 * FLOAT
        run(history, logits, looks.append)
        final = compare_accuracy(logits, FLOAT, LABELS).top1_loss_pp
        after.append(next((seen.images for seen in looks if seen.loss_bounds_pp[0] >= final - 0.5), 900))
    assert np.mean(after[6:]) < 0.8 * after[0]


def test_some_images_tell_the_divergence_over_all() -> None:
    history, looks = ImageHistory(FLOAT, LABELS), []
    run(history, disturbed(0.1), looks.append)
    assert all(seen.divergence is None for seen in looks), "nothing is known to tell it by"
    run(history, disturbed(0.3, 1))
    for noise in (0.1, 0.5):
        logits = disturbed(noise, 2)
        looks = []
        run(history, logits, looks.append)
        expected = mean_divergence(FLOAT, logits)
        assert [seen.divergence for seen in looks[4:]] == pytest.approx([expected] * len(looks[4:]), rel=0.3)
        # On the images that come first it is larger.
        assert mean_divergence(FLOAT[history.blocks()[0]], logits[history.blocks()[0]]) > 1.2 * expected


def test_a_loss_at_a_limit_is_within_it() -> None:
    """One image of a hundred, where float has 80 right, is no more than one percentage point."""
    answers = np.eye(2, dtype=np.float32)[[0] * 80 + [1] * 20]
    worse = np.eye(2, dtype=np.float32)[[0] * 79 + [1] * 21]
    assert compare_accuracy(worse, answers, np.zeros(100, np.int64)).top1_loss_pp == 1.0


@pytest.mark.parametrize("count", [7, 100, 375, 900])
def test_limits_close_in_on_the_very_number_that_is_measured(count: int) -> None:
    rng, seen = np.random.default_rng(count), np.ones(count, bool)
    for _ in range(50):
        float_right, right = rng.random((2, count)) < 0.8
        logits, float_logits = (np.stack([one, ~one], 1).astype(np.float32) for one in (right, float_right))
        loss = compare_accuracy(logits, float_logits, np.zeros(count, np.int64)).top1_loss_pp
        assert loss_bounds(right, float_right, seen) == (loss, loss)


def test_gains_are_bounded_by_what_float_has_wrong() -> None:
    float_right = np.array([True] * 8 + [False] * 2)
    nothing = np.zeros(10, bool)
    assert loss_bounds(nothing, float_right, nothing) == (-20.0, 80.0)
    seen = ~float_right
    assert loss_bounds(nothing, float_right, seen) == (0.0, 80.0)
    assert loss_bounds(seen, float_right, seen) == (-20.0, 60.0)


def test_nothing_is_run_after_a_stop() -> None:
    asked, history = [], ImageHistory(FLOAT, LABELS)
    blocks = history.blocks()

    def parts() -> Iterator[np.ndarray]:
        for block in blocks:
            asked.append(len(block))
            yield FLOAT[block]

    def look(seen: Seen) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        history.run(blocks, parts(), look)
    assert asked == [len(blocks[0])]
    # What it saw is known of nevertheless; it is no whole run.
    assert history.runs.sum() == len(blocks[0]) and not history.whole


def test_a_trial_that_stops_is_certain_to_be_off_the_front(handle: StudyHandle) -> None:
    evaluator = AnalyticEvaluator(blocks=True)
    outcome = run_search(handle, problem(evaluator), Limits(40))
    stopped = [trial for trial in finished(handle.study, TrialState.PRUNED) if "bound" in trial.user_attrs]
    assert outcome.stopped == "budget"
    # Stopped trials count, and are never measured twice.
    assert outcome.completed + outcome.stopped_early == 40 == len(evaluator.measured) == len(set(evaluator.measured))
    assert len(stopped) == outcome.stopped_early == 40 - len(finished(handle.study)) > 3
    assert len(measured_trials(handle.study)) == 40
    for trial in stopped:
        assert trial.values is None and "measurement" not in trial.user_attrs
        assert trial.user_attrs["images"] < 1000
        assert trial.user_attrs["stopped_early"].startswith("dominated by trial ")
        low, high = trial.user_attrs["top1_loss_bounds_pp"]
        assert low < high
    again = run_search(handle, problem(evaluator), Limits(46))
    assert again.completed + again.stopped_early == 6
    assert len(evaluator.measured) == len(set(evaluator.measured)) == 46


@pytest.mark.slow
def test_the_front_is_that_of_full_runs(handle: StudyHandle, tmp_path: Path) -> None:
    evaluator = AnalyticEvaluator(blocks=True)
    run_search(handle, problem(evaluator), Limits(32))
    with study_to_search("full", Identity({"model": "a"}), f"sqlite:///{tmp_path}/full.db") as full:
        full.study.sampler = make_sampler("random", 0, 0)
        # The same configurations: random proposals do not depend on what came out.
        run_search(full, SearchProblem(problem(evaluator).space, AnalyticEvaluator().evaluate), Limits(32))
        every = study_front(full.study)
    front = study_front(handle.study)
    assert {point.trial for point in front} == {point.trial for point in every}
    assert hypervolume(front, evaluator.baseline) == hypervolume(every, evaluator.baseline)


def test_constraints_stop_a_trial_only_where_a_closer_one_is_known(handle: StudyHandle) -> None:
    evaluator = AnalyticEvaluator(blocks=True)
    constraints = Constraints.against(evaluator.baseline, {"latency_ms": 0.6 * evaluator.baseline.latency.median_ms})
    run_search(handle, problem(evaluator, constraints), Limits(30))
    first, *_ = handle.study.get_trials()
    # Too slow, but the first: it is the closest so far.
    assert first.state == TrialState.COMPLETE and not first.user_attrs["feasible"]
    beyond = [trial for trial in handle.study.get_trials() if "limit" in trial.user_attrs.get("stopped_early", "")]
    assert beyond
    for trial in beyond:
        assert (trial.state, trial.user_attrs["feasible"]) == (TrialState.PRUNED, False)
        assert trial.user_attrs["images"] == 0 and trial.user_attrs["top1_loss_bounds_pp"] is None
        closest = min(done.user_attrs["violation"] for done in finished(handle.study) if done.number < trial.number)
        assert trial.user_attrs["violation"] > closest


def test_the_rule_needs_certainty() -> None:
    evaluator = AnalyticEvaluator()
    latency, memory = evaluator.baseline.latency, evaluator.baseline.memory
    StoppingRule({}).check(latency, memory, Seen(50, (5.0, 6.0), 0.1))
    StoppingRule({}, Constraints.against(evaluator.baseline, {"top1_loss_pp": 1.0})).check(
        latency, memory, Seen(50, (5.0, 6.0), 0.1)
    )


@pytest.mark.slow
def test_images_are_counted_and_early_stopping_can_be_turned_off(tmp_path: Path) -> None:
    options = ("search", "--budget", "28", "--sampler", "random", "--json")
    stopping = json.loads(invoke(tmp_path, *options, BLOCKS="1").stdout)
    trials = load_study("demo", f"sqlite:///{tmp_path}/studies/demo.db").study.get_trials()
    images = sum(trial.user_attrs["images"] for trial in trials if "images" in trial.user_attrs)
    assert stopping["image_evaluations"] == {"made": images, "without_early_stopping": 28_000}
    assert images < 28_000
    assert stopping["trials"]["complete"] + stopping["trials"]["stopped_early"] == 28
    whole = json.loads(invoke(tmp_path, *options, "--study", "whole", "--no-early-stopping", BLOCKS="1").stdout)
    assert whole["image_evaluations"] == {"made": 28_000, "without_early_stopping": 28_000}
    assert whole["trials"]["complete"] == 28
    assert [point["trial"] for point in whole["front"]] == [point["trial"] for point in stopping["front"]]


def test_without_early_stopping_a_trial_is_told_of_the_others_all_the_same(handle: StudyHandle) -> None:
    evaluator, told = AnalyticEvaluator(), []

    def evaluate(config: QuantConfig, rule: StoppingRule) -> Measurement:
        told.append(rule)
        return evaluator.evaluate(config, rule)

    searched = replace(problem(evaluator), evaluate=evaluate, early_stopping=False, confirmed=True)
    assert run_search(handle, searched, Limits(6)).completed == 6
    assert [len(rule.trials) for rule in told] == list(range(6)) and not any(rule.stops for rule in told)
    best = StoppingRule({3: (0.0, 0.0, -100.0)}, stops=False)
    best.check(evaluator.baseline.latency, evaluator.baseline.memory)
    assert best.dominated((1.0, 1.0, 0.0)) == "dominated by trial 3"


def test_a_stop_carries_what_is_known() -> None:
    evaluator = AnalyticEvaluator()
    constraints = Constraints.against(evaluator.baseline, {"latency_ms": 1.0})
    trials = {3: (1.0, 1.0, 50.0)}
    rule = StoppingRule(trials, constraints)
    with pytest.raises(EarlyStop) as caught:
        rule.check(evaluator.baseline.latency, evaluator.baseline.memory)
    bound = caught.value.bound
    assert (bound.reason, bound.images, bound.loss_bounds_pp, bound.infeasible) == (
        "beyond the limit of latency_ms",
        0,
        None,
        True,
    )
    with pytest.raises(EarlyStop, match="dominated by trial 3"):
        StoppingRule(trials).check(evaluator.baseline.latency, evaluator.baseline.memory, Seen(50, (60.0, 70.0), 0.1))
