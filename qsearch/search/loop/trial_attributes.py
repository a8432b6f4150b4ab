"""What a study keeps of a trial: how it ended, its objectives, and attributes for people."""

from __future__ import annotations

import math
from typing import Any

import optuna
from optuna.trial import TrialState

from qsearch.config import QuantConfig
from qsearch.errors import MeasureError, TrialError
from qsearch.measure.measurement import MEAN_AVERAGE_PRECISION, Measurement
from qsearch.search.constraints import mark_feasibility
from qsearch.search.loop.early_stopping import Bound
from qsearch.search.loop.problem import SearchProblem
from qsearch.search.study import OBJECTIVES

__all__ = ["checked", "objective_values", "stopped_attributes", "trial_attributes", "write_end"]


def checked(measurement: Measurement) -> Measurement:
    """The measurement, known to have finite objectives.

    Raises:
        MeasureError: One is NaN or infinite.
    """
    for name, value in zip(OBJECTIVES, objective_values(measurement), strict=True):
        if not math.isfinite(value):
            raise MeasureError(f"{name} of this configuration is {value}, not a finite number")
    return measurement


def objective_values(measurement: Measurement) -> tuple[float, float, float]:
    """latency_ms, peak_bytes and top1_loss_pp."""
    return (measurement.latency.median_ms, float(measurement.memory.peak_bytes), measurement.accuracy.top1_loss_pp)


def write_end(
    study: optuna.Study,
    problem: SearchProblem,
    begun: tuple[optuna.Trial, QuantConfig],
    ended: Measurement | Bound | TrialError,
) -> None:
    """Tell a study how a trial ended.

    What was stopped early is pruned, with what is known of it, and has no objective values.

    Args:
        study: The study.
        problem: What is searched.
        begun: The trial and its configuration.
        ended: A measurement, a bound, or why there is neither.
    """
    trial, config = begun
    if isinstance(ended, TrialError):
        trial.set_user_attr("error", f"{type(ended).__name__}: {ended}")
        study.tell(trial, state=TrialState.FAIL)
    elif isinstance(ended, Bound):
        for name, value in stopped_attributes(config, ended).items():
            trial.set_user_attr(name, value)
        if ended.infeasible:
            mark_feasibility(trial, problem.constraints, ended.least)
        study.tell(trial, state=TrialState.PRUNED)
    else:
        values = objective_values(ended)
        for name, value in trial_attributes(config, ended).items():
            trial.set_user_attr(name, value)
        mark_feasibility(trial, problem.constraints, values)
        if problem.annotate is not None:
            problem.annotate(trial, config, ended)
        study.tell(trial, values)


def trial_attributes(config: QuantConfig, measurement: Measurement) -> dict[str, Any]:
    """What the dashboard shows of a trial; the whole measurement and a few numbers from it on their own."""
    return {
        "measurement": measurement.to_json(),
        **dict(zip(OBJECTIVES, objective_values(measurement), strict=True)),
        "mAP" if measurement.accuracy.metric == MEAN_AVERAGE_PRECISION else "top1": measurement.accuracy.top1,
        "images": measurement.accuracy.images,
        **({"noisy_timing": True} if measurement.latency.noisy else {}),
        **_layer_counts(config),
    }


def stopped_attributes(config: QuantConfig, bound: Bound) -> dict[str, Any]:
    """What the dashboard shows of a trial that was stopped early."""
    return {
        "bound": bound.to_json(),
        "stopped_early": bound.reason,
        "images": bound.images,
        "top1_loss_bounds_pp": bound.loss_bounds_pp,
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
