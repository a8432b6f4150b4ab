"""The search loop: ask for a configuration, measure it, tell the study.

Optuna's own `optimize` would count duplicates and failures against the budget and would go on after a defect.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from qsearch.config import QuantConfig
from qsearch.errors import MeasureError, StudyError, TrialError
from qsearch.measure.measurement import Measurement
from qsearch.search.anchors import enqueue_anchors
from qsearch.search.bound_space import BoundSpace
from qsearch.search.constraints import Constraints, mark_feasibility
from qsearch.search.early_stopping import Bound, EarlyStop, StoppingRule
from qsearch.search.proposals import unseen_values
from qsearch.search.study import OBJECTIVES, StudyHandle, finished, measured_trials, requeue

__all__ = ["Limits", "Outcome", "SearchProblem", "run_search"]

Annotate = Callable[[optuna.Trial, QuantConfig, Measurement], None]
OnTrial = Callable[[FrozenTrial], None]
Stop = Literal["budget", "timeout", "exhausted", "interrupted"]

MOST_DUPLICATES_IN_A_ROW = 3
MOST_FAILURES_IN_A_ROW = 20


@dataclass(frozen=True)
class SearchProblem:
    """What is searched.

    Attributes:
        space: The search space over the model's layers.
        evaluate: Measures one configuration; a TrialError fails the trial alone. With early stopping it is given a
            StoppingRule as well, and may raise EarlyStop.
        annotate: Adds notes and pictures to a measured trial before it is finished.
        constraints: Limits beyond which a trial is infeasible.
        early_stopping: Whether trials end as soon as their outcome is certain.
        anchored: Whether plain starting points come first; a sampler that knows the space does without.
    """

    space: BoundSpace
    evaluate: Callable[..., Measurement]
    annotate: Annotate | None = None
    constraints: Constraints = Constraints()
    early_stopping: bool = False
    anchored: bool = True


@dataclass(frozen=True)
class Limits:
    """When a search ends.

    Attributes:
        budget: Measured trials the study shall have in total: completed ones, and those stopped early.
        timeout_s: No trial is begun after that many seconds.
        seed: Of the random steps away from duplicates.
    """

    budget: int
    timeout_s: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a search ended.

    Attributes:
        stopped: Why it ended.
        completed: Trials completed by this run.
        stopped_early: Trials that it stopped early.
    """

    stopped: Stop
    completed: int
    stopped_early: int = 0


def run_search(handle: StudyHandle, problem: SearchProblem, limits: Limits, on_trial: OnTrial | None = None) -> Outcome:
    """Run trials until the budget, the time or the space is used up.

    Args:
        handle: The study, driven by nobody else.
        problem: What is searched.
        limits: When to stop.
        on_trial: Called after every trial that was measured or failed.

    Returns:
        Why it ended. An interrupt (Ctrl-C) is an outcome, not an exception: the trial it fell into is failed and
        its configuration enqueued again.

    Raises:
        StudyError: The study cannot be written, or trial after trial failed.
    """
    loop = _Loop(handle, problem, limits, on_trial)
    try:
        return loop.run()
    except KeyboardInterrupt:
        return loop.outcome("interrupted")


@dataclass
class _Loop:
    """State of one run of the loop."""

    handle: StudyHandle
    problem: SearchProblem
    limits: Limits
    on_trial: OnTrial | None
    completed: int = 0
    stopped_early: int = 0
    duplicates: int = 0
    failures: int = 0
    # Content hash -> number of the trial that measured it, or failed at it in this run.
    known: dict[str, int] = field(default_factory=dict)

    def outcome(self, stopped: Stop) -> Outcome:
        """How the run ended."""
        return Outcome(stopped, self.completed, self.stopped_early)

    def run(self) -> Outcome:
        start = time.monotonic()
        study = self.handle.study
        with self.handle.guard():
            if self.problem.anchored:
                enqueue_anchors(study, self.problem.space)
            before = measured_trials(study)
            trials = len(study.get_trials(deepcopy=False))
        self.known = {trial.user_attrs["config_hash"]: trial.number for trial in before if "config_hash" in trial.user_attrs}
        rng = np.random.default_rng([self.limits.seed, trials])
        while True:
            if len(before) + self.completed + self.stopped_early >= self.limits.budget:
                return self.outcome("budget")
            if self.limits.timeout_s is not None and time.monotonic() - start >= self.limits.timeout_s:
                return self.outcome("timeout")
            if self.duplicates >= MOST_DUPLICATES_IN_A_ROW and not self._step_aside(rng):
                return self.outcome("exhausted")
            self._one_trial()

    def _step_aside(self, rng: np.random.Generator) -> bool:
        """Enqueue a new configuration near the last proposal; False if the space holds none."""
        study = self.handle.study
        with self.handle.guard():
            if finished(study, TrialState.WAITING):
                return True
            last = study.get_trials(deepcopy=False)[-1]
            values = unseen_values(self.problem.space, dict(last.params), self.known, rng)
            if values is not None:
                study.enqueue_trial(values, user_attrs={"near": last.number})
        return values is not None

    def _one_trial(self) -> None:
        trial: optuna.Trial | None = None
        try:
            with self.handle.guard():
                trial = self.handle.study.ask(self.problem.space.distributions())
            self._measure(trial, self.problem.space.config(trial.params))
        except BaseException as error:
            # Not the configuration's fault: full disk, interrupt, defect. It is tried again by the next run.
            self._abandon(trial, error)
            raise

    def _measure(self, trial: optuna.Trial, config: QuantConfig) -> None:
        study, digest = self.handle.study, config.content_hash()
        with self.handle.guard():
            trial.set_user_attr("config_hash", digest)
            if digest in self.known:
                trial.set_user_attr("duplicate_of", self.known[digest])
                study.tell(trial, state=TrialState.PRUNED)
                self.duplicates += 1
                return
            trial.set_user_attr("config", config.to_json())
        self.duplicates = 0
        try:
            measurement = _checked(self._evaluate(config))
        except EarlyStop as stop:
            self._stop(trial, config, stop.bound)
            return
        except TrialError as error:
            self._fail(trial, digest, error)
            return
        with self.handle.guard():
            for name, value in _attributes(config, measurement).items():
                trial.set_user_attr(name, value)
            mark_feasibility(trial, self.problem.constraints, _values(measurement))
            if self.problem.annotate is not None:
                self.problem.annotate(trial, config, measurement)
            study.tell(trial, _values(measurement))
            # Within the guard, whose end an interrupt may fall on.
            self.failures = 0
            self.completed += 1
        self._finish(trial, digest)

    def _evaluate(self, config: QuantConfig) -> Measurement:
        if not self.problem.early_stopping:
            return self.problem.evaluate(config)
        with self.handle.guard():
            rule = StoppingRule(finished(self.handle.study), self.problem.constraints)
        return self.problem.evaluate(config, rule)

    def _stop(self, trial: optuna.Trial, config: QuantConfig, bound: Bound) -> None:
        """Record a trial that was stopped early: pruned, with what is known of it, and without objective values."""
        with self.handle.guard():
            for name, value in _stopped_attributes(config, bound).items():
                trial.set_user_attr(name, value)
            if bound.infeasible:
                mark_feasibility(trial, self.problem.constraints, bound.least)
            self.handle.study.tell(trial, state=TrialState.PRUNED)
            self.failures = 0
            self.stopped_early += 1
        self._finish(trial, config.content_hash())

    def _fail(self, trial: optuna.Trial, digest: str, error: TrialError) -> None:
        with self.handle.guard():
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            self.handle.study.tell(trial, state=TrialState.FAIL)
        self.failures += 1
        self._finish(trial, digest)
        if self.failures >= MOST_FAILURES_IN_A_ROW:
            raise StudyError(
                f"{self.failures} trials in a row failed, so the search has stopped; the last one: {error}"
            ) from error

    def _finish(self, trial: optuna.Trial, digest: str) -> None:
        self.known[digest] = trial.number
        if self.on_trial is not None:
            self.on_trial(self._frozen(trial.number))

    def _abandon(self, trial: optuna.Trial | None, error: BaseException) -> None:
        """Fail a trial that something else than its configuration ended, and enqueue it again."""
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
        try:
            with self.handle.guard():
                frozen = None if trial is None else self._frozen(trial.number)
                if trial is None or frozen is None or frozen.state.is_finished():
                    return
                requeue(self.handle.study, frozen)
                trial.set_user_attr("error", reason)
                self.handle.study.tell(trial, state=TrialState.FAIL)
        except StudyError:
            # The database is what failed. The trial stays running and the next run reaps it.
            return

    def _frozen(self, number: int) -> FrozenTrial:
        return self.handle.study.get_trials(deepcopy=False)[number]


def _checked(measurement: Measurement) -> Measurement:
    for name, value in zip(OBJECTIVES, _values(measurement), strict=True):
        if not math.isfinite(value):
            raise MeasureError(f"{name} of this configuration is {value}, not a finite number")
    return measurement


def _values(measurement: Measurement) -> tuple[float, float, float]:
    return (measurement.latency.median_ms, float(measurement.memory.peak_bytes), measurement.accuracy.top1_loss_pp)


def _attributes(config: QuantConfig, measurement: Measurement) -> dict[str, Any]:
    """What the dashboard shows of a trial; the whole measurement and a few numbers from it on their own."""
    return {
        "measurement": measurement.to_json(),
        **dict(zip(OBJECTIVES, _values(measurement), strict=True)),
        "top1": measurement.accuracy.top1,
        "images": measurement.accuracy.images,
        **({"noisy_timing": True} if measurement.latency.noisy else {}),
        **_layer_counts(config),
    }


def _stopped_attributes(config: QuantConfig, bound: Bound) -> dict[str, Any]:
    """What the dashboard shows of a trial that was stopped early."""
    return {
        "bound": bound.to_json(),
        "stopped_early": bound.reason,
        "images": bound.images,
        "top1_loss_bounds_pp": bound.loss_bounds_pp and list(bound.loss_bounds_pp),
        "latency_ms": bound.latency.median_ms,
        "peak_bytes": bound.memory.peak_bytes,
        **({"noisy_timing": True} if bound.latency.noisy else {}),
        **_layer_counts(config),
    }


def _layer_counts(config: QuantConfig) -> dict[str, int]:
    counts: dict[str, int] = {}
    for precision in config.precision.values():
        counts[f"layers_{precision}"] = counts.get(f"layers_{precision}", 0) + 1
    return counts
