"""Trials that are prepared while another is measured: the order of things, and what becomes of those that are under way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from analytic import AnalyticEvaluator, PassingPacker
from optuna.trial import FrozenTrial, TrialState

from qsearch.config import QuantConfig
from qsearch.errors import BuildError, UsageError
from qsearch.measure.measurement import Measurement
from qsearch.search.bound_space import bind_space
from qsearch.search.constraints import Constraints
from qsearch.search.driver import Limits, Outcome, SearchProblem, run_search
from qsearch.search.early_stopping import StoppingRule
from qsearch.search.pipeline import Pipeline
from qsearch.search.processors import Processors, check_jobs, default_jobs, split_processors
from qsearch.search.samplers import make_sampler
from qsearch.search.space import SearchSpace, load_space
from qsearch.search.study import Identity, StudyHandle, finished, study_to_search
from qsearch.search.workers import Worker

# Long enough for anything but a deadlock, seconds.
PATIENCE_S = 60.0
Measure = Callable[[QuantConfig, StoppingRule | None], Measurement]


@pytest.fixture
def handle(tmp_path: Path) -> Iterator[StudyHandle]:
    """An empty study."""
    with study_to_search("demo", Identity({"model": "a"}), f"sqlite:///{tmp_path}/study.db") as opened:
        opened.study.sampler = make_sampler("random", 0, 0)
        yield opened


class InlineWorker(Worker):
    """Packs at once in this process."""

    def __init__(self, pack: Callable[[QuantConfig], QuantConfig] = lambda config: config) -> None:
        super().__init__(PassingPacker())
        self.pack, self.packed = pack, list[str]()

    def submit(self, config: QuantConfig) -> Future[Any]:
        """Pack now."""
        packed: Future[Any] = Future()
        self.packed.append(config.content_hash())
        try:
            packed.set_result(self.pack(config))
        except Exception as error:
            packed.set_exception(error)
        return packed


def search(
    handle: StudyHandle, evaluator: AnalyticEvaluator, measure: Measure, worker: Worker, budget: int, **options: Any
) -> Outcome:
    """Run trials of the default space through a pipeline."""
    space = bind_space(options.pop("space", None) or load_space("default"), evaluator.graph)
    on_trial = options.pop("on_trial", None)
    with Pipeline(worker, lambda packed: packed, measure) as pipeline:
        problem = SearchProblem(space, evaluator.evaluate, pipeline=pipeline, **options)
        return run_search(handle, problem, Limits(budget), on_trial)


def test_the_next_trial_is_prepared_while_one_is_measured_and_measurements_never_overlap(handle: StudyHandle) -> None:
    evaluator, worker, measuring = AnalyticEvaluator(), InlineWorker(), threading.Lock()
    ahead: list[int] = []

    def measure(config: QuantConfig, rule: StoppingRule | None) -> Measurement:
        assert measuring.acquire(blocking=False)
        number = len(evaluator.measured)
        deadline = time.monotonic() + PATIENCE_S
        # All but the last one find the next one coming.
        while len(worker.packed) < min(number + 2, 12) and time.monotonic() < deadline:
            time.sleep(0.001)
        ahead.append(len(worker.packed) - number)
        measuring.release()
        return evaluator.evaluate(config, rule)

    seen: list[int] = []
    outcome = search(handle, evaluator, measure, worker, 12, on_trial=lambda trial: seen.append(trial.number))
    assert (outcome.stopped, outcome.completed) == ("budget", 12)
    assert ahead == [2] * 11 + [1]
    assert seen == sorted(seen)
    assert evaluator.measured == worker.packed == [trial.user_attrs["config_hash"] for trial in finished(handle.study)]


def test_a_configuration_that_is_being_measured_is_not_begun_again(handle: StudyHandle) -> None:
    evaluator, worker, told = AnalyticEvaluator(), InlineWorker(), threading.Event()
    space = bind_space(load_space("default"), evaluator.graph)
    for _ in range(3):
        handle.study.enqueue_trial(next(space.all_values()))

    def measure(config: QuantConfig, rule: StoppingRule | None) -> Measurement:
        # The first is still running when the others have been turned away.
        assert evaluator.measured or told.wait(PATIENCE_S)
        return evaluator.evaluate(config, rule)

    def pack(config: QuantConfig) -> QuantConfig:
        if len(worker.packed) == 2:
            states = [trial.state for trial in handle.study.get_trials(deepcopy=False)[:3]]
            assert states == [TrialState.RUNNING, TrialState.PRUNED, TrialState.PRUNED]
            told.set()
        return config

    worker.pack = pack
    assert search(handle, evaluator, measure, worker, 4, anchored=False).completed == 4
    duplicates = finished(handle.study, TrialState.PRUNED)
    assert [trial.user_attrs["duplicate_of"] for trial in duplicates[:2]] == [0, 0]
    assert len(set(evaluator.measured)) == len(evaluator.measured) == 4


def test_a_small_space_is_tried_to_its_end(handle: StudyHandle) -> None:
    evaluator = AnalyticEvaluator(3)
    space = SearchSpace.model_validate({"version": 1, "calibration": {"modes": ["max"]}})
    outcome = search(handle, evaluator, evaluator.evaluate, InlineWorker(), 100, space=space)
    assert (outcome.stopped, outcome.completed) == ("exhausted", 8)
    assert len(evaluator.measured) == 8
    assert finished(handle.study, TrialState.RUNNING) == []


@pytest.mark.parametrize("defect", [None, ZeroDivisionError("a defect")], ids=["interrupt", "defect"])
def test_all_that_is_under_way_at_an_interrupt_or_a_defect_is_enqueued_again(
    handle: StudyHandle, defect: Exception | None
) -> None:
    evaluator, worker = AnalyticEvaluator(), InlineWorker()
    at: list[str] = []

    def measure(config: QuantConfig, rule: StoppingRule | None) -> Measurement:
        deadline = time.monotonic() + PATIENCE_S
        if len(evaluator.measured) == 3 and not at:
            while len(worker.packed) < 5 and time.monotonic() < deadline:
                time.sleep(0.001)
            at.extend(worker.packed[3:])
            if defect is not None:
                raise defect
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        return evaluator.evaluate(config, rule)

    if defect is None:
        assert search(handle, evaluator, measure, worker, 8).stopped == "interrupted"
    else:
        with pytest.raises(ZeroDivisionError):
            search(handle, evaluator, measure, worker, 8)
    failed = finished(handle.study, TrialState.FAIL)
    assert [trial.user_attrs["config_hash"] for trial in failed] == at
    assert len(at) == 2
    assert finished(handle.study, TrialState.RUNNING) == []
    again = AnalyticEvaluator()
    # They wait behind the anchors.
    assert search(handle, again, again.evaluate, InlineWorker(), 22).stopped == "budget"
    assert set(at) <= set(again.measured)
    hashes = [trial.user_attrs["config_hash"] for trial in finished(handle.study)]
    assert len(set(hashes)) == len(hashes) == 22


def test_a_stopping_rule_knows_the_trials_completed_when_it_is_asked(handle: StudyHandle) -> None:
    evaluator, written = AnalyticEvaluator(), threading.Semaphore(0)
    known: list[int] = []

    def measure(config: QuantConfig, rule: StoppingRule | None) -> Measurement:
        # The trial before is written down after this one has begun.
        assert not evaluator.measured or written.acquire(timeout=PATIENCE_S)
        assert rule is not None
        known.append(len(rule.trials))
        return evaluator.evaluate(config)

    def on_trial(trial: FrozenTrial) -> None:
        written.release()

    options = {"early_stopping": True, "constraints": Constraints(), "on_trial": on_trial}
    search(handle, evaluator, measure, InlineWorker(), 5, **options)
    assert known == [0, 1, 2, 3, 4]


class TroublesomePacker:
    """Fails at some configurations, and takes its process down at others."""

    def pack(self, config: QuantConfig) -> int:
        """The number of this process, or trouble by the mode of calibration."""
        if config.calibration.mode == "mse":
            raise BuildError("layer 'classifier': no kernel")
        if config.calibration.mode == "kl_divergence":
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()


def test_a_worker_hears_no_interrupt_reports_errors_as_they_are_and_is_started_again(handle: StudyHandle) -> None:
    evaluator, pids = AnalyticEvaluator(), list[int]()
    space = bind_space(load_space("default"), evaluator.graph)
    int8 = {layer.name: "int8" for layer in space.layers}
    modes = ("max", "percentile", "mse", "kl_divergence", "max", "percentile")
    for granularity, mode in zip(["channel_wise"] * 4 + ["layer_wise"] * 2, modes, strict=True):
        handle.study.enqueue_trial({**int8, "calibration": mode, "granularity": granularity})

    def measure(packed: int, rule: StoppingRule | None) -> Measurement:
        pids.append(packed)
        os.kill(packed, signal.SIGINT)
        return evaluator.evaluate(QuantConfig.model_validate({"default_precision": "int8"}))

    worker = Worker(TroublesomePacker())
    assert search(handle, evaluator, measure, worker, 4, anchored=False).completed == 4  # type: ignore[arg-type]
    refused, died = finished(handle.study, TrialState.FAIL)
    assert refused.user_attrs["error"] == "BuildError: layer 'classifier': no kernel"
    assert "the process that lowers and links died" in died.user_attrs["error"]
    assert died.params["calibration"] == "kl_divergence"
    first, second = pids[0], pids[-1]
    assert pids == [first, first, second, second]
    assert first != second
    assert os.getpid() not in pids
    for pid in (first, second):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_processors_are_set_aside_for_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsearch.search.processors._available", lambda: [0, 2, 3, 5])
    assert split_processors(2, 1) == Processors(frozenset({5}), frozenset({0, 2, 3}))
    assert split_processors(2, 3) == Processors(frozenset({2, 3, 5}), frozenset({0}))
    assert split_processors(1, 1) is None
    assert [default_jobs(threads) for threads in (1, 3, 4, 9)] == [2, 2, 1, 1]
    check_jobs(None, 9)
    with pytest.raises(UsageError, match=r"--jobs 2 needs a processor beside the 4 .* this process may use 4"):
        check_jobs(2, 4)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are not kept to processors here")
def test_a_block_keeps_to_its_processors_and_gives_them_back() -> None:
    before = os.sched_getaffinity(0)
    one = frozenset({min(before)})
    with Processors(one, frozenset(before)).alone():
        assert os.sched_getaffinity(0) == one
    assert os.sched_getaffinity(0) == before
