"""Early stopping on images: a trial that can neither enter the front nor keep within the constraints ends at once.

What is known of it by then, time and bytes and limits of its loss, is a bound and no measurement: such a trial has no
objective values, is no candidate for the front, and yet counts as tried. The limits of the loss are certain, see
`qsearch.measure.image_blocks`: with the same times, the front is that of a search without early stopping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qsearch.measure.image_blocks import Seen
from qsearch.measure.measurement import Latency, Memory
from qsearch.search.constraints import Constraints

__all__ = ["Bound", "EarlyStop", "StoppingRule"]


@dataclass(frozen=True)
class Bound:
    """What is known of a trial that was stopped.

    Attributes:
        reason: Why its outcome was certain.
        latency: As of a completed trial.
        memory: As of a completed trial.
        seen: What the images had shown; None before the first.
        infeasible: Whether it was stopped because of a constraint.
    """

    reason: str
    latency: Latency
    memory: Memory
    seen: Seen | None
    infeasible: bool

    @property
    def images(self) -> int:
        """How many images had been seen."""
        return 0 if self.seen is None else self.seen.images

    @property
    def loss_bounds_pp(self) -> list[float] | None:
        """Limits of the loss that all images would have given, percentage points; None before the first."""
        return None if self.seen is None else list(self.seen.loss_bounds_pp)

    @property
    def least(self) -> tuple[float, float, float]:
        """latency_ms, peak_bytes and the lowest top1_loss_pp it could have had."""
        # More than every image cannot be gained.
        low = -100.0 if self.seen is None else self.seen.loss_bounds_pp[0]
        return (self.latency.median_ms, float(self.memory.peak_bytes), low)

    def to_json(self) -> dict[str, Any]:
        """Plain types, for user attributes."""
        return {
            "reason": self.reason,
            "latency": vars(self.latency),
            "memory": vars(self.memory),
            "images": self.images,
            "top1_loss_bounds_pp": self.loss_bounds_pp,
            "divergence": None if self.seen is None else self.seen.divergence,
        }


class EarlyStop(Exception):
    """Ends the measurement of a trial; not an error. Its one argument is the Bound."""

    @property
    def bound(self) -> Bound:
        """What is known of the trial."""
        return self.args[0]


@dataclass(frozen=True)
class StoppingRule:
    """Says when a trial's outcome is certain, from the trials completed before it.

    A trial is stopped if another one is no slower, no larger, and loses no more than the least this one can lose; or
    if it violates the constraints more than some completed trial does, by what it can lose least. The second leaves
    the closest configurations right where none is feasible. A dominating trial need not be feasible itself: whatever
    it violates, the dominated one violates at least as much.

    Attributes:
        trials: Number -> objective values of the completed trials; small, to be sent to another process.
        constraints: The study's.
        stops: Whether it stops trials; one that does not only tells what reaches the front.
    """

    trials: Mapping[int, Sequence[float]]
    constraints: Constraints = Constraints()
    stops: bool = True

    def check(self, latency: Latency, memory: Memory, seen: Seen | None = None) -> None:
        """Stop the trial if nothing it can still show would change its outcome.

        Args:
            latency: The trial's.
            memory: The trial's.
            seen: What its images have shown; None before the first.

        Raises:
            EarlyStop: Its outcome is certain.
        """
        if not self.stops:
            return
        bound = Bound("", latency, memory, seen, False)
        reason, infeasible = self._beyond_constraints(bound.least), True
        if reason is None:
            reason, infeasible = self.dominated(bound.least), False
        if reason is not None:
            raise EarlyStop(Bound(reason, latency, memory, seen, infeasible))

    def _beyond_constraints(self, least: Sequence[float]) -> str | None:
        found = self._violations(least)
        if not found or not self.trials:
            return None
        closest = min(sum(self._violations(values).values()) for values in self.trials.values())
        return "beyond the limit of " + " and ".join(found) if sum(found.values()) > closest else None

    def _violations(self, values: Sequence[float]) -> dict[str, float]:
        return {name: value for name, value in self.constraints.violations(values).items() if value > 0}

    def dominated(self, least: Sequence[float]) -> str | None:
        """By which trial objective values are dominated, in words; None if by none."""
        if not self.trials:
            return None
        better = (np.array(list(self.trials.values())) <= least).all(axis=1)
        return f"dominated by trial {list(self.trials)[int(better.argmax())]}" if better.any() else None
