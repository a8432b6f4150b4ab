"""What a search is given: the problem, when to stop; and how it ended."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol

import optuna

from qsearch.config import QuantConfig
from qsearch.measure.measurement import Measurement
from qsearch.search.bound_space import BoundSpace
from qsearch.search.constraints import Constraints
from qsearch.search.loop.early_stopping import StoppingRule
from qsearch.search.loop.pipeline import Pipeline

__all__ = ["Crew", "Limits", "Outcome", "SearchProblem", "Stop"]

Annotate = Callable[[optuna.Trial, QuantConfig, Measurement], None]
Stop = Literal["budget", "enqueued", "timeout", "exhausted", "interrupted"]


class Crew(Protocol):
    """Others that build and measure trials, several at a time."""

    def width(self) -> int:
        """How many trials are worth having under way now, at least 1."""
        ...

    def submit(self, config: QuantConfig, rule: StoppingRule | None) -> Future[Measurement]:
        """Build and measure a configuration: a measurement to be, or what `SearchProblem.evaluate` raises."""
        ...


@dataclass(frozen=True)
class SearchProblem:
    """What is searched.

    Attributes:
        space: The search space over the model's layers.
        evaluate: Measures one configuration; a TrialError fails the trial alone. With early stopping or
            confirmation it is given a StoppingRule as well, and may raise EarlyStop.
        annotate: Adds notes and pictures to a measured trial before it is finished.
        constraints: Limits beyond which a trial is infeasible.
        early_stopping: Whether trials end as soon as their outcome is certain.
        confirmed: Whether what reaches the front is timed again, as it may be there by luck.
        anchored: Whether plain starting points come first; a sampler that knows the space does without.
        pipeline: Measures a trial while the next one is built, in place of `evaluate`; None for one by one.
        crew: Builds and measures trials elsewhere, in place of both.
        beat: Called when a trial begins, and when one has ended: whoever watches the process knows that it goes on.
        rest: Called when it waits for other processes.
        device: What kind of device trials are measured on, for their attributes.
    """

    space: BoundSpace
    evaluate: Callable[..., Measurement]
    annotate: Annotate | None = None
    constraints: Constraints = Constraints()
    early_stopping: bool = False
    confirmed: bool = False
    anchored: bool = True
    pipeline: Pipeline | None = None
    crew: Crew | None = None
    beat: Callable[[], object] = lambda: None
    rest: Callable[[], object] = lambda: None
    device: str = ""


@dataclass(frozen=True)
class Limits:
    """When a search ends.

    Attributes:
        budget: Measured trials the study shall have in total: completed ones, and those stopped early.
        timeout_s: No trial is begun after that many seconds.
        seed: Of the random steps away from duplicates.
        enqueued_only: Whether it ends once no trial is enqueued.
    """

    budget: int
    timeout_s: float | None = None
    seed: int = 0
    enqueued_only: bool = False


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
