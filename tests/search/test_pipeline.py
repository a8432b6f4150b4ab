"""Trials that are built while another is measured: the order of things, and what becomes of those that are under way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from analytic import AnalyticEvaluator
from optuna.trial import TrialState

from qsearch.config import QuantConfig
from qsearch.errors import BuildError, MeasureError, UsageError
from qsearch.measure.image_blocks import Seen
from qsearch.measure.measurement import Measurement
from qsearch.search.bound_space import bind_space
from qsearch.search.loop.driver import Limits, Outcome, SearchProblem, run_search
from qsearch.search.loop.early_stopping import Bound, EarlyStop, StoppingRule
from qsearch.search.loop.pipeline import Pipeline
from qsearch.search.loop.processors import Processors, check_jobs, default_jobs, split_processors
from qsearch.search.loop.workers import Measure, Worker
from qsearch.search.samplers import make_sampler
from qsearch.search.space import SearchSpace, load_space
from qsearch.search.study import Identity, StudyHandle, study_to_search
from qsearch.search.study_trials import finished, measured_trials

# Long enough for anything but a deadlock, seconds.
PATIENCE_S = 60.0


@pytest.fixture
def handle(tmp_path: Path) -> Iterator[StudyHandle]:
    """An empty study."""
    with study_to_search("demo", Identity({"model": "a"}), f"sqlite:///{tmp_path}/study.db") as opened:
        opened.study.sampler = make_sampler("random", 0, 0)
        yield opened


class ThreadWorker(Worker):
    """Measures in a thread of this process, with what tests give it."""

    def __init__(self, measure: Measure) -> None:
        super().__init__(lambda: measure)
        self._thread = ThreadPoolExecutor(1)

    def start(self) -> None:
        """It is always there."""

    def measure(self, packed: Any, rule: StoppingRule | None) -> Future[Measurement]:
        """Measure in the thread."""
        return self._thread.submit(self._open_device(), packed, rule)

    def close(self) -> None:
        """Wait for what is under way."""
        self._thread.shutdown(wait=True, cancel_futures=True)


class Packer:
    """Passes configurations through and remembers them."""

    def __init__(self) -> None:
        self.packed: list[str] = []

    def __call__(self, config: QuantConfig) -> QuantConfig:
        """Pack."""
        self.packed.append(config.content_hash())
        return config


Packs = Callable[[QuantConfig], Any]


def search(
    handle: StudyHandle, evaluator: AnalyticEvaluator, pack: Packs, worker: Worker, budget: int, **options: Any
) -> Outcome:
    """Run trials of the default space through a pipeline."""
    space = bind_space(options.pop("space", None) or load_space("default"), evaluator.graph)
    on_trial = options.pop("on_trial", None)
    with Pipeline(pack, worker) as pipeline:
        problem = SearchProblem(space, evaluator.evaluate, pipeline=pipeline, **options)
        return run_search(handle, problem, Limits(budget), on_trial)


def test_the_next_trial_is_built_while_one_is_measured_and_the_one_before_written_down(handle: StudyHandle) -> None:
    evaluator, pack = AnalyticEvaluator(), Packer()
    seen: list[int] = []
    found: list[tuple[int, int]] = []

    def measure(config: QuantConfig, rule: StoppingRule | None) -> Measurement:
        number = len(evaluator.measured)
        deadline = time.monotonic() + PATIENCE_S
        # All but the last one find the next one built, and all but the first find the one before written down.
        while (len(pack.packed) < min(number + 2, 12) or len(seen) < number) and time.monotonic() < deadline:
            time.sleep(0.001)
        found.append((len(pack.packed) - number, len(seen) - number))
        return evaluator.evaluate(config, rule)

    outcome = search(handle, evaluator, pack, ThreadWorker(measure), 12, on_trial=lambda trial: seen.append(trial.number))
    assert (outcome.stopped, outcome.completed) == ("budget", 12)
    assert found == [(2, 0)] * 11 + [(1, 0)]
    assert seen == sorted(seen)
    assert evaluator.measured == pack.packed == [trial.user_attrs["config_hash"] for trial in finished(handle.study)]


def test_a_configuration_that_is_being_measured_is_not_begun_again(handle: StudyHandle) -> None:
    evaluator, packer, told = AnalyticEvaluator(), Packer(), threading.Event()
    space = bind_space(load_space("default"), evaluator.graph)
    for _ in range(3):
        handle.study.enqueue_trial(next(space.all_values()))

    def measure(config: QuantConfig, rule: StoppingRule | None) -> Measurement:
        # The first is still running when the others have been turned away.
        assert evaluator.measured or told.wait(PATIENCE_S)
        return evaluator.evaluate(config, rule)

    def pack(config: QuantConfig) -> QuantConfig:
        if len(packer.packed) == 1:
            states = [trial.state for trial in handle.study.get_trials(deepcopy=False)[:3]]
            assert states == [TrialState.RUNNING, TrialState.PRUNED, TrialState.PRUNED]
            told.set()
        return packer(config)

    assert search(handle, evaluator, pack, ThreadWorker(measure), 4, anchored=False).completed == 4
    duplicates = finished(handle.study, TrialState.PRUNED)
    assert [trial.user_attrs["duplicate_of"] for trial in duplicates[:2]] == [0, 0]
    assert len(set(evaluator.measured)) == len(evaluator.measured) == 4


def test_a_small_space_is_tried_to_its_end(handle: StudyHandle) -> None:
    evaluator = AnalyticEvaluator(3)
    space = SearchSpace.model_validate({"version": 1, "calibration": {"modes": ["max"]}})
    outcome = search(handle, evaluator, Packer(), ThreadWorker(evaluator.evaluate), 100, space=space)
    assert (outcome.stopped, outcome.completed) == ("exhausted", 8)
    assert len(evaluator.measured) == 8
    assert finished(handle.study, TrialState.RUNNING) == []


@pytest.mark.parametrize("defect", [None, ZeroDivisionError("a defect")], ids=["interrupt", "defect"])
def test_all_that_is_under_way_at_an_interrupt_or_a_defect_is_enqueued_again(
    handle: StudyHandle, defect: Exception | None
) -> None:
    evaluator, pack = AnalyticEvaluator(), Packer()
    at: list[str] = []

    def measure(config: QuantConfig, rule: StoppingRule | None) -> Measurement:
        deadline = time.monotonic() + PATIENCE_S
        if len(evaluator.measured) == 3 and not at:
            while len(pack.packed) < 5 and time.monotonic() < deadline:
                time.sleep(0.001)
            at.extend(pack.packed[3:])
            if defect is not None:
                raise defect
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        return evaluator.evaluate(config, rule)

    if defect is None:
        assert search(handle, evaluator, pack, ThreadWorker(measure), 8).stopped == "interrupted"
    else:
        with pytest.raises(ZeroDivisionError):
            search(handle, evaluator, pack, ThreadWorker(measure), 8)
    failed = finished(handle.study, TrialState.FAIL)
    assert [trial.user_attrs["config_hash"] for trial in failed] == at
    assert len(at) == 2
    assert finished(handle.study, TrialState.RUNNING) == []
    again = AnalyticEvaluator()
    # They wait behind the anchors.
    assert search(handle, again, Packer(), ThreadWorker(again.evaluate), 22).stopped == "budget"
    assert set(at) <= set(again.measured)
    hashes = [trial.user_attrs["config_hash"] for trial in finished(handle.study)]
    assert len(set(hashes)) == len(hashes) == 22


def test_a_stopping_rule_knows_all_trials_measured_before(handle: StudyHandle) -> None:
    evaluator = AnalyticEvaluator()
    known: list[dict[int, Sequence[float]]] = []

    def measure(config: QuantConfig, rule: StoppingRule | None) -> Measurement:
        assert rule is not None
        known.append(dict(rule.trials))
        return evaluator.evaluate(config)

    search(handle, evaluator, Packer(), ThreadWorker(measure), 5, early_stopping=True)
    values = {trial.number: trial.values for trial in finished(handle.study)}
    assert [len(one) for one in known] == [0, 1, 2, 3, 4]
    assert all(list(one[number]) == values[number] for one in known for number in one)


def troublesome_pack(config: QuantConfig) -> QuantConfig:
    """Fails at one mode of calibration."""
    if config.calibration.mode == "mse":
        raise BuildError("layer 'classifier': no kernel")
    return config


def troublesome_device() -> Measure:
    """Measures; or by the mode of calibration fails, stops, or takes its process down. Its process is its number of images."""
    evaluator = AnalyticEvaluator()

    def measure(config: QuantConfig, rule: StoppingRule | None) -> Measurement:
        os.kill(os.getpid(), signal.SIGINT)
        measured, mode = evaluator.evaluate(config), config.calibration.mode
        if mode == "kl_divergence":
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "percentile" and config.granularity == "channel_wise":
            raise MeasureError("layer 'classifier': NaN")
        if mode == "percentile":
            assert rule is not None
            raise EarlyStop(Bound("far off", measured.latency, measured.memory, Seen(os.getpid(), (0.0, 1.0), 0.0), False))
        return replace(measured, accuracy=replace(measured.accuracy, images=os.getpid()))

    return measure


def test_a_worker_hears_no_interrupt_answers_with_errors_as_they_are_and_is_started_again(handle: StudyHandle) -> None:
    evaluator = AnalyticEvaluator()
    space = bind_space(load_space("default"), evaluator.graph)
    int8 = {layer.name: "int8" for layer in space.layers}
    channels = [("max", "channel_wise"), ("percentile", "channel_wise"), ("mse", "channel_wise")]
    layers = [("percentile", "layer_wise"), ("kl_divergence", "layer_wise"), ("max", "layer_wise")]
    for mode, granularity in (*channels, *layers):
        handle.study.enqueue_trial({**int8, "calibration": mode, "granularity": granularity})
    outcome = search(handle, evaluator, troublesome_pack, Worker(troublesome_device), 3, anchored=False, early_stopping=True)
    assert (outcome.completed, outcome.stopped_early) == (2, 1)
    failed = {trial.params["calibration"]: trial.user_attrs["error"] for trial in finished(handle.study, TrialState.FAIL)}
    assert failed["percentile"] == "MeasureError: layer 'classifier': NaN"
    assert failed["mse"] == "BuildError: layer 'classifier': no kernel"
    assert failed["kl_divergence"].startswith("MeasureError: the process that measures died")
    assert len(failed) == 3
    pids = [trial.user_attrs["images"] for trial in measured_trials(handle.study)]
    first, second = pids[0], pids[-1]
    assert pids == [first, first, second]
    assert len({first, second, os.getpid()}) == 3
    for pid in (first, second):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_processors_are_set_aside_for_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsearch.search.loop.processors.available_processors", lambda: [0, 2, 3, 5])
    assert split_processors(2, 1) == Processors(frozenset({5}), frozenset({0, 2, 3}))
    assert split_processors(2, 3) == Processors(frozenset({2, 3, 5}), frozenset({0}))
    assert split_processors(1, 1) is None
    assert [default_jobs(threads) for threads in (1, 3, 4, 9)] == [2, 2, 1, 1]
    check_jobs(None, 9)
    with pytest.raises(UsageError, match=r"--jobs 2 needs 1 beside the 4 .* this process may use 4"):
        check_jobs(2, 4)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are not kept to processors here")
def test_blocks_keep_to_their_processors_and_give_them_back() -> None:
    before, end = os.sched_getaffinity(0), threading.Event()
    one = frozenset({min(before)})
    with Processors(one, frozenset(before)).alone():
        assert os.sched_getaffinity(0) == one
    assert os.sched_getaffinity(0) == before
    thread = threading.Thread(target=end.wait)
    thread.start()
    assert thread.native_id is not None
    with Processors(frozenset(before), one).aside():
        assert os.sched_getaffinity(0) == os.sched_getaffinity(thread.native_id) == one
    assert os.sched_getaffinity(0) == os.sched_getaffinity(thread.native_id) == before
    end.set()
    thread.join()
