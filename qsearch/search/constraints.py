"""Constraints: limits on the objectives that narrow the front asked for.

A configuration beyond a limit is infeasible: it is measured and kept, because samplers learn from it, but it
belongs neither to the front nor to what is picked from it. A study keeps its constraints for life, since trials
stopped early were stopped with them in mind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import optuna
from optuna.trial import FrozenTrial

from qsearch.errors import UsageError
from qsearch.measure.measurement import TOP1, Measurement
from qsearch.search.study import LOSS_BOUND_PP, OBJECTIVES, objective_names

__all__ = ["Constraints", "checked_limits", "is_feasible", "limits_text", "mark_feasibility", "violation"]


@dataclass(frozen=True)
class Constraints:
    """Upper limits on objectives.

    Attributes:
        limits: Objective -> largest value allowed, in the objective's unit.
        scale: Objective -> what a violation is divided by: float's latency and bytes, and LOSS_BOUND_PP, so that
            violations of different objectives can be added.
    """

    limits: Mapping[str, float] = field(default_factory=dict)
    scale: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def against(cls, baseline: Measurement, limits: Mapping[str, float]) -> Constraints:
        """Limits whose violations are counted in shares of the float module."""
        scale = (baseline.latency.median_ms, float(baseline.memory.peak_bytes), LOSS_BOUND_PP)
        return cls(limits, dict(zip(OBJECTIVES, scale, strict=True)))

    def violations(self, values: Sequence[float]) -> dict[str, float]:
        """How far beyond each limit objectives are, normalised; zero or less is within it.

        Args:
            values: latency_ms, peak_bytes, top1_loss_pp.
        """
        named = dict(zip(OBJECTIVES, values, strict=True))
        return {name: (named[name] - limit) / self.scale[name] for name, limit in self.limits.items()}


def checked_limits(max_latency_ms: float | None, max_bytes: float | None, max_loss_pp: float | None) -> dict[str, float]:
    """Objective -> limit, for the limits that were given.

    Raises:
        UsageError: One is negative, NaN or infinite.
    """
    given = zip(
        OBJECTIVES, ("--max-latency-ms", "--max-bytes", "--max-loss-pp"), (max_latency_ms, max_bytes, max_loss_pp), strict=True
    )
    limits = {}
    for name, option, limit in given:
        if limit is None:
            continue
        if not (math.isfinite(limit) and limit >= 0):
            raise UsageError(f"{option} must be a finite number, 0 or more, got {limit:g}")
        limits[name] = float(limit)
    return limits


def limits_text(limits: Mapping[str, float], metric: str = TOP1) -> str:
    """Limits for people: 'latency_ms <= 2, top1_loss_pp <= 1'; 'none' where there are none.

    Args:
        limits: Objective -> largest value.
        metric: What is lost; of a detector mAP, and the third objective is then called mAP_loss_pp.
    """
    names = dict(zip(OBJECTIVES, objective_names(metric), strict=True))
    return ", ".join(f"{names[name]} <= {limit:.10g}" for name, limit in limits.items()) or "none"


def mark_feasibility(trial: optuna.Trial, constraints: Constraints, values: Sequence[float]) -> None:
    """Tell samplers how far a trial is beyond each limit, and people whether it is feasible.

    The dashboard reads no constraints set this way, so user attributes say it again.

    Args:
        trial: A trial that is still running.
        constraints: The study's; without limits nothing is written.
        values: Its objectives.
    """
    if not constraints.limits:
        return
    found = constraints.violations(values)
    for name, value in found.items():
        trial.set_constraint(name, value)
    trial.set_user_attr("feasible", all(value <= 0 for value in found.values()))
    trial.set_user_attr("violation", sum(max(0.0, value) for value in found.values()))


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether a trial is within all limits; True in a study without constraints."""
    return violation(trial) == 0.0


def violation(trial: FrozenTrial) -> float:
    """Sum of a trial's normalised violations, 0 for a feasible one."""
    return sum(max(0.0, value) for value in trial.constraints.values())
