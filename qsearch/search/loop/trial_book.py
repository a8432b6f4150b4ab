"""The trials that a process asks a study for: asked for in turns, known while they are under way, and told how they ended.

Several processes may ask one study, on several machines: each asks in a turn of its own, so that all know what the others are at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from qsearch.config import QuantConfig
from qsearch.errors import StudyError, TrialError
from qsearch.measure.measurement import Measurement
from qsearch.search.anchors import enqueue_anchors
from qsearch.search.locks import TurnLost
from qsearch.search.loop.early_stopping import Bound, EarlyStop, StoppingRule
from qsearch.search.loop.problem import Limits, Outcome, SearchProblem, Stop
from qsearch.search.loop.trial_attributes import checked, objective_values, write_end
from qsearch.search.members import MEMBER, Heartbeat
from qsearch.search.proposals import unseen_values
from qsearch.search.study import StudyHandle
from qsearch.search.study_trials import finished, is_measured, known_configurations, measured_trials, reap_trials, requeue

__all__ = ["Begun", "OnTrial", "TrialBook"]

OnTrial = Callable[[FrozenTrial], object]

MOST_DUPLICATES_IN_A_ROW = 3
MOST_FAILURES_IN_A_ROW = 20
# How often a process that has nothing to do looks whether the others are done, seconds.
_POLL_S = 0.5
_GONE = "the process that tried it has gone"
# A server that is restarted takes a turn back: its end tells it, or what another one has done with the same trial meanwhile.
_SHARED_TURN = (TurnLost, optuna.exceptions.UpdateFinishedTrialError)


@dataclass
class Begun:
    """A trial that was asked for and is not finished.

    Attributes:
        trial: Running.
        config: What it measures.
        packed: What it was linked to, in a pipeline.
        measured: Its measurement to be, in a pipeline.
    """

    trial: optuna.Trial
    config: QuantConfig
    packed: Any = None
    measured: Future[Measurement] = field(default_factory=Future)

    @property
    def retried(self) -> bool:
        """Whether a process died while it tried this configuration before."""
        return int(self.trial.user_attrs.get("attempt", 1)) > 1


@dataclass
class TrialBook:
    """What one process knows of the trials of a study, and the only thing that writes them.

    Attributes:
        handle: The study.
        problem: What is searched.
        limits: When to stop.
        on_trial: Called after every trial that was measured or failed.
    """

    handle: StudyHandle
    problem: SearchProblem
    limits: Limits
    on_trial: OnTrial | None
    start: float = field(default_factory=time.monotonic)
    completed: int = 0
    stopped_early: int = 0
    duplicates: int = 0
    failures: int = 0
    # Content hash -> number of the trial that failed at it in this run.
    failed: dict[str, int] = field(default_factory=dict)
    in_flight: list[optuna.Trial] = field(default_factory=list)
    # Number -> objective values of what was measured here.
    measured: dict[int, Sequence[float]] = field(default_factory=dict)
    rng: np.random.Generator = field(init=False)
    heart: Heartbeat = field(init=False)

    def outcome(self, stopped: Stop) -> Outcome:
        """How the run ended."""
        return Outcome(stopped, self.completed, self.stopped_early)

    def open(self) -> None:
        """Join the study."""
        study = self.handle.study
        with self.handle.guard():
            if self.problem.anchored:
                enqueue_anchors(study, self.problem.space)
            trials = len(study.get_trials(deepcopy=False))
        self.rng = np.random.default_rng([self.limits.seed, trials])
        self.heart = Heartbeat(study._storage)

    def close(self) -> None:
        """Leave it."""
        self.heart.close()

    def abandon_all(self, error: BaseException) -> None:
        """Fail what is under way, for something that is not the configurations' fault, and enqueue it again."""
        for trial in list(self.in_flight):
            self._abandon(trial, error)

    def met(self) -> bool:
        """Wait for what others have under way; False if the budget has room again, because some of it came to nothing."""
        study = self.handle.study
        self.problem.rest()
        while True:
            # A turn that is lost meanwhile harms nothing.
            with suppress(*_SHARED_TURN), self.handle.turn():
                reap_trials(study, _GONE)
                measured = len(measured_trials(study))
                running = len(finished(study, TrialState.RUNNING))
                if measured >= self.limits.budget or self._is_late():
                    return True
                if measured + running < self.limits.budget:
                    return False
            time.sleep(_POLL_S)

    def _is_late(self) -> bool:
        return self.limits.timeout_s is not None and time.monotonic() - self.start >= self.limits.timeout_s

    def asked(self) -> tuple[Begun | None, Stop | None]:
        """The next trial; or why there is none for now."""
        while True:
            begun: Begun | None = None
            before = list(self.in_flight)
            try:
                with self.handle.turn():
                    reap_trials(self.handle.study, _GONE)
                    trials = self.handle.study.get_trials(deepcopy=False)
                    reason = self._reason_to_stop(trials)
                    if reason is None:
                        begun = self._begin(self.failed | known_configurations(trials))
            except _SHARED_TURN as error:
                # Somebody else may have asked for the same meanwhile, or have failed what was nobody's yet.
                for trial in [one for one in self.in_flight if one not in before]:
                    self._abandon(trial, error)
                    self._leave(trial)
                continue
            if begun is not None or reason is not None:
                return begun, reason

    def _reason_to_stop(self, trials: Sequence[FrozenTrial]) -> Stop | None:
        if sum(is_measured(trial) or trial.state == TrialState.RUNNING for trial in trials) >= self.limits.budget:
            return "budget"
        if self._is_late():
            return "timeout"
        if self.limits.enqueued_only and not any(trial.state == TrialState.WAITING for trial in trials):
            return "enqueued"
        if self.duplicates >= MOST_DUPLICATES_IN_A_ROW and not self._step_aside(trials):
            return "exhausted"
        return None

    def _step_aside(self, trials: Sequence[FrozenTrial]) -> bool:
        """Enqueue a new configuration near the last proposal; False if the space holds none."""
        if any(trial.state == TrialState.WAITING for trial in trials):
            return True
        last, known = trials[-1], self.failed | known_configurations(trials)
        values = unseen_values(self.problem.space, dict(last.params), known, self.rng)
        if values is not None:
            self.handle.study.enqueue_trial(values, user_attrs={"near": last.number})
        return values is not None

    def _begin(self, known: Mapping[str, int]) -> Begun | None:
        """Ask for a trial, in a turn; None if its configuration is known, which ends it.

        Args:
            known: Content hash -> number, of what need not be tried.
        """
        study = self.handle.study
        self.problem.beat()
        trial = study.ask(self.problem.space.distributions())
        # Within the guard, whose end an interrupt may fall on.
        self.in_flight.append(trial)
        trial.set_user_attr(MEMBER, self.heart.member)
        self.heart.begin(trial)
        config = self.problem.space.config(trial.params)
        digest = config.content_hash()
        if self.problem.device:
            trial.set_user_attr("device", self.problem.device)
        trial.set_user_attr("config_hash", digest)
        if digest in known:
            trial.set_user_attr("duplicate_of", known[digest])
            study.tell(trial, state=TrialState.PRUNED)
            self._leave(trial)
            self.duplicates += 1
            return None
        trial.set_user_attr("config", config.to_json())
        self.duplicates = 0
        return Begun(trial, config)

    def _leave(self, trial: optuna.Trial) -> None:
        """A trial is no more under way here."""
        self.in_flight.remove(trial)
        self.heart.end(trial)

    def rule(self) -> StoppingRule | None:
        """What ends the next trial early, or has it timed again, if anything may."""
        stops = self.problem.early_stopping
        if not (stops or self.problem.confirmed):
            return None
        with self.handle.guard():
            complete = {trial.number: trial.values for trial in finished(self.handle.study)}
        return StoppingRule(complete | self.measured, self.problem.constraints, stops)

    def ended(self, begun: Begun, result: Callable[[], Measurement]) -> Measurement | Bound | TrialError:
        """How a trial ended; stopping rules know it from now on."""
        try:
            measurement = checked(result())
        except EarlyStop as stop:
            return stop.bound
        except TrialError as error:
            return error
        self.measured[begun.trial.number] = objective_values(measurement)
        return measurement

    def conclude(self, begun: Begun, ended: Measurement | Bound | TrialError) -> None:
        """Write down how a trial ended."""
        trial = begun.trial
        try:
            with self.handle.guard():
                write_end(self.handle.study, self.problem, (trial, begun.config), ended)
                self.failures = self.failures + 1 if isinstance(ended, TrialError) else 0
                self.completed += isinstance(ended, Measurement)
                self.stopped_early += isinstance(ended, Bound)
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
            if not self._frozen(trial.number).state.is_finished():
                raise
            # Others had not heard of this process for so long that they took the trial over: it is theirs.
            self._leave(trial)
            return
        if isinstance(ended, TrialError):
            self.failed[begun.config.content_hash()] = trial.number
        self._finish(trial)
        if isinstance(ended, TrialError) and self.failures >= MOST_FAILURES_IN_A_ROW:
            raise StudyError(
                f"{self.failures} trials in a row failed, so the search has stopped; the last one: {ended}"
            ) from ended

    def _finish(self, trial: optuna.Trial) -> None:
        self._leave(trial)
        self.problem.beat()
        if self.on_trial is not None:
            self.on_trial(self._frozen(trial.number))

    def _abandon(self, trial: optuna.Trial, error: BaseException) -> None:
        """Fail a trial that something else than its configuration ended, and enqueue it again."""
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
        try:
            with self.handle.guard():
                frozen = self._frozen(trial.number)
                if frozen.state.is_finished():
                    return
                requeue(self.handle.study, frozen)
                trial.set_user_attr("error", reason)
                self.handle.study.tell(trial, state=TrialState.FAIL)
        except (StudyError, optuna.exceptions.UpdateFinishedTrialError):
            # The database is what failed, and the trial stays running until the next run reaps it; or others just did.
            return

    def _frozen(self, number: int) -> FrozenTrial:
        return self.handle.study.get_trials(deepcopy=False)[number]
