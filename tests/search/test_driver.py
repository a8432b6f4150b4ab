"""The search loop: budget, duplicates, failures, interrupts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import sqlalchemy
from analytic import AnalyticEvaluator
from optuna.trial import TrialState

from qsearch.config import QuantConfig
from qsearch.errors import BuildError, StudyError
from qsearch.measure.measurement import Measurement
from qsearch.search.anchors import enqueue, make_anchors
from qsearch.search.bound_space import BoundSpace, bind_space
from qsearch.search.loop.driver import Limits, SearchProblem, run_search
from qsearch.search.proposals import unseen_values
from qsearch.search.samplers import make_sampler
from qsearch.search.space import SearchSpace, load_space
from qsearch.search.study import Identity, StudyHandle, study_to_search
from qsearch.search.study_trials import finished, known_configurations, reap_trials

IDENTITY = Identity({"model": "a"})
# Three layers of two precisions and one calibration: eight configurations.
SMALL = SearchSpace.model_validate({"version": 1, "calibration": {"modes": ["max"]}})


@pytest.fixture
def handle(tmp_path: Path) -> Iterator[StudyHandle]:
    """An empty study."""
    with study_to_search("demo", IDENTITY, f"sqlite:///{tmp_path}/study.db") as opened:
        opened.study.sampler = make_sampler("random", 0, 0)
        yield opened


def small(evaluator: AnalyticEvaluator) -> SearchProblem:
    """The problem of eight configurations."""
    return SearchProblem(bind_space(SMALL, evaluator.graph), evaluator.evaluate)


def full(evaluator: AnalyticEvaluator) -> SearchProblem:
    """The problem of the default space."""
    return SearchProblem(bind_space(load_space("default"), evaluator.graph), evaluator.evaluate)


def test_budget_is_the_total_and_nothing_is_measured_twice(handle: StudyHandle) -> None:
    evaluator = AnalyticEvaluator()
    assert run_search(handle, full(evaluator), Limits(12)).completed == 12
    outcome = run_search(handle, full(evaluator), Limits(22))
    assert (outcome.stopped, outcome.completed) == ("budget", 10)
    assert run_search(handle, full(evaluator), Limits(22)).completed == 0
    assert len(finished(handle.study)) == 22 == len(set(evaluator.measured)) == len(evaluator.measured)


def test_attributes_of_a_trial(handle: StudyHandle) -> None:
    evaluator = AnalyticEvaluator()
    seen: list[int] = []
    run_search(handle, full(evaluator), Limits(2), lambda trial: seen.append(trial.number))
    assert seen == [0, 1]
    first, second = finished(handle.study)
    assert first.user_attrs["anchor"] == "all fp32"
    config = QuantConfig.model_validate(second.user_attrs["config"])
    assert config.content_hash() == second.user_attrs["config_hash"]
    assert second.user_attrs["layers_int8"] == 8
    assert "layers_fp32" not in second.user_attrs
    assert second.user_attrs["measurement"]["accuracy"]["images"] == 1000
    assert [second.user_attrs[name] for name in ("latency_ms", "peak_bytes", "top1_loss_pp")] == second.values


def test_a_small_space_is_tried_to_the_end_and_said_to_be_exhausted(handle: StudyHandle) -> None:
    evaluator = AnalyticEvaluator(3)
    outcome = run_search(handle, small(evaluator), Limits(100))
    assert (outcome.stopped, outcome.completed) == ("exhausted", 8)
    assert len(evaluator.measured) == 8
    duplicates = finished(handle.study, TrialState.PRUNED)
    assert all(trial.user_attrs["duplicate_of"] < trial.number for trial in duplicates)
    assert run_search(handle, small(evaluator), Limits(100)).stopped == "exhausted"
    assert len(evaluator.measured) == 8


def test_timeout_ends_the_loop(handle: StudyHandle) -> None:
    evaluator = AnalyticEvaluator()
    assert run_search(handle, full(evaluator), Limits(10, timeout_s=0.0)) == run_search(handle, full(evaluator), Limits(10, 0.0))
    assert evaluator.measured == []
    assert run_search(handle, full(evaluator), Limits(10_000, timeout_s=1.0)).stopped == "timeout"
    assert evaluator.measured


def test_a_loop_over_what_is_enqueued_asks_for_nothing_else(handle: StudyHandle) -> None:
    evaluator = AnalyticEvaluator()
    problem = replace(full(evaluator), anchored=False)
    anchors = make_anchors(problem.space)[:4]
    enqueue(handle.study, anchors)
    enqueue(handle.study, anchors)
    assert run_search(handle, problem, Limits(3, enqueued_only=True)).stopped == "budget"
    outcome = run_search(handle, problem, Limits(10, enqueued_only=True))
    assert (outcome.stopped, outcome.completed) == ("enqueued", 1)
    assert evaluator.measured == [problem.space.config(one.values).content_hash() for one in anchors]
    assert [trial.user_attrs["anchor"] for trial in finished(handle.study)] == [one.label for one in anchors]
    assert run_search(handle, problem, Limits(10, enqueued_only=True)).completed == 0


def test_only_a_trial_error_fails_a_trial_alone(handle: StudyHandle) -> None:
    evaluator = AnalyticEvaluator()

    def evaluate(config: QuantConfig) -> Measurement:
        if len(evaluator.measured) == 1:
            evaluator.measured.append("failed")
            raise BuildError("layer 'classifier': no kernel")
        return evaluator.evaluate(config)

    problem = SearchProblem(full(evaluator).space, evaluate)
    assert run_search(handle, problem, Limits(4)).completed == 4
    (failed,) = finished(handle.study, TrialState.FAIL)
    assert failed.user_attrs["error"] == "BuildError: layer 'classifier': no kernel"


def test_a_measurement_that_is_no_number_fails_its_trial(handle: StudyHandle) -> None:
    evaluator = AnalyticEvaluator()
    broken = evaluator.evaluate(QuantConfig())
    object.__setattr__(broken.latency, "median_ms", float("nan"))
    answers = iter([broken])
    problem = SearchProblem(full(evaluator).space, lambda config: next(answers, None) or evaluator.evaluate(config))
    run_search(handle, problem, Limits(1))
    (failed,) = finished(handle.study, TrialState.FAIL)
    assert "latency_ms" in failed.user_attrs["error"]


def test_failure_after_failure_stops_the_search(handle: StudyHandle) -> None:
    def evaluate(config: QuantConfig) -> Measurement:
        raise BuildError("no compiler")

    with pytest.raises(StudyError, match=r"20 trials in a row failed.*no compiler"):
        run_search(handle, SearchProblem(full(AnalyticEvaluator()).space, evaluate), Limits(100))
    assert finished(handle.study, TrialState.RUNNING) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError("defect"), OSError(28, "No space left on device")])
def test_other_errors_leave_the_study_intact_and_the_configuration_enqueued(handle: StudyHandle, error: BaseException) -> None:
    evaluator = AnalyticEvaluator()
    interrupted: list[str] = []

    def evaluate(config: QuantConfig) -> Measurement:
        if len(evaluator.measured) == 3 and not interrupted:
            interrupted.append(config.content_hash())
            raise error
        return evaluator.evaluate(config)

    problem = SearchProblem(full(evaluator).space, evaluate)
    if isinstance(error, KeyboardInterrupt):
        assert run_search(handle, problem, Limits(8)).stopped == "interrupted"
    else:
        with pytest.raises(type(error)):
            run_search(handle, problem, Limits(8))
    (failed,) = finished(handle.study, TrialState.FAIL)
    assert failed.user_attrs["error"]
    assert finished(handle.study, TrialState.RUNNING) == []
    # It waits behind the anchors.
    run_search(handle, problem, Limits(22))
    assert len(evaluator.measured) == len(set(evaluator.measured)) == 22
    assert interrupted[0] in evaluator.measured


def test_a_full_disk_is_one_message_and_loses_nothing(handle: StudyHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = AnalyticEvaluator()
    run_search(handle, full(evaluator), Limits(5))
    engine, most = handle.study._storage._backend.engine, [1_000_000_000]  # type: ignore[attr-defined]
    # SQLite keeps the limit per connection, and the pool has several.
    sqlalchemy.event.listen(engine, "checkout", lambda one, *_: one.execute(f"PRAGMA max_page_count={most[0]}"))
    with monkeypatch.context() as patch:
        patch.setattr("qsearch.search.loop.trial_attributes.trial_attributes", lambda *_: {"filler": "x" * 10_000_000})
        with engine.connect() as connection:
            most[0] = connection.exec_driver_sql("PRAGMA page_count").scalar() + 200
        with pytest.raises(StudyError, match="disk is full"):
            run_search(handle, full(evaluator), Limits(10))
        most[0] = 1_000_000_000
    assert len(finished(handle.study)) == 5
    reap_trials(handle.study)
    run_search(handle, full(evaluator), Limits(10))
    hashes = [trial.user_attrs["config_hash"] for trial in finished(handle.study)]
    assert len(set(hashes)) == 10


def test_a_configuration_that_kills_every_time_is_given_up(handle: StudyHandle) -> None:
    bound = full(AnalyticEvaluator()).space
    for _ in range(2):
        trial = handle.study.ask(bound.distributions())
        trial.set_user_attr("config_hash", "c" * 64)
        assert reap_trials(handle.study, "it died") == 1
    assert finished(handle.study, TrialState.WAITING) == []
    last = finished(handle.study, TrialState.FAIL)[-1]
    assert last.user_attrs["error"] == "it died; given up after 2 attempts"
    assert known_configurations(handle.study.get_trials()) == {"c" * 64: last.number}


def test_a_trial_killed_while_it_was_proposed_keeps_its_plan(handle: StudyHandle) -> None:
    bound = full(AnalyticEvaluator()).space
    handle.study.enqueue_trial({"classifier": "fp32", "features.0.conv.0": "int8"})
    handle.study.ask({"classifier": bound.distributions()["classifier"]})
    reap_trials(handle.study)
    (waiting,) = finished(handle.study, TrialState.WAITING)
    assert waiting.system_attrs["fixed_params"] == {"classifier": "fp32", "features.0.conv.0": "int8"}


def bound_small() -> BoundSpace:
    """Eight configurations."""
    return bind_space(SMALL, AnalyticEvaluator(3).graph)


def test_unseen_values_are_near_and_run_out() -> None:
    bound, rng, known = bound_small(), np.random.default_rng(0), set()
    start = next(bound.all_values())
    known.add(bound.config(start).content_hash())
    values = unseen_values(bound, start, known, rng)
    assert values is not None
    assert sum(values[name] != start[name] for name in start) == 1
    for _ in range(7):
        values = unseen_values(bound, start, known, rng)
        assert values is not None
        known.add(bound.config(values).content_hash())
    assert unseen_values(bound, start, known, rng) is None


def test_random_search_on_a_nearly_full_space_terminates(handle: StudyHandle) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    evaluator = AnalyticEvaluator(4)
    outcome = run_search(handle, small(evaluator), Limits(16))
    assert (outcome.stopped, outcome.completed) == ("budget", 16)
    assert len(handle.study.get_trials()) < 16 * 5
