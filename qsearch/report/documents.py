"""The JSON documents of the commands."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from qsearch.errors import StudyError
from qsearch.measure.measurement import MEAN_AVERAGE_PRECISION, Measurement
from qsearch.search.constraints import is_feasible
from qsearch.search.evaluation.evaluator import Settings
from qsearch.search.finetuned import FinetunedTrial, load_finetuned
from qsearch.search.front import (
    FrontPoint,
    beats_float,
    closest_points,
    hypervolume,
    kept_points,
    measurement_from_json,
    study_front,
)
from qsearch.search.study import StudyHandle, objective_names, recorded_parts
from qsearch.search.study_trials import finished, measured_trials

if TYPE_CHECKING:
    # Loads torch and TVM, which reading a study needs neither of.
    from qsearch.search.bound import TablesBound

__all__ = [
    "baseline_document",
    "baseline_of",
    "point_document",
    "record_bound",
    "record_run",
    "run_of",
    "settings_of",
    "study_document",
]

_RUN = "run"
_BASELINE = "baseline"
_BOUND = "tables_bound"


def record_run(handle: StudyHandle, baseline: Measurement, run: Mapping[str, Any]) -> None:
    """Keep in the study what a report of it needs and trials do not hold.

    Args:
        handle: The study.
        baseline: The float module. The first one recorded stays: a study has one scale for its hypervolume.
        run: model and target as the user wrote them, and seconds{total, float_pass} of the last run; layers, machine and
            versions, see `qsearch.search.provenance`.
    """
    study = handle.study
    with handle.guard():
        if _BASELINE not in study.user_attrs:
            study.set_user_attr(_BASELINE, baseline.to_json())
        study.set_user_attr(_RUN, dict(run))
        if baseline.accuracy.metric == MEAN_AVERAGE_PRECISION:
            # Only what the dashboard calls it: attributes keep the name of the first task's loss.
            study.set_metric_names(objective_names(baseline.accuracy.metric))


def record_bound(handle: StudyHandle, bound: TablesBound) -> None:
    """Keep in the study how far the planner's tables say its front could go."""
    with handle.guard():
        handle.study.set_user_attr(_BOUND, {"hypervolume": bound.hypervolume, "trials": bound.trials})


def baseline_of(handle: StudyHandle) -> Measurement | None:
    """The float module of a study; None before its first run got that far."""
    data = handle.study.user_attrs.get(_BASELINE)
    return None if data is None else measurement_from_json(data)


def run_of(handle: StudyHandle) -> dict[str, Any]:
    """What `record_run` kept last; empty before the first run got that far, and of older versions without some keys."""
    return dict(handle.study.user_attrs.get(_RUN, {}))


def settings_of(handle: StudyHandle) -> Settings:
    """What a study searches.

    Raises:
        StudyError: The study was made before it got that far.
    """
    data = run_of(handle).get("settings")
    if data is None:
        raise StudyError(f"study {handle.name!r} does not say what it searched; run its search command once more")
    return Settings.from_json(data)


def study_document(handle: StudyHandle) -> dict[str, Any]:
    """Everything there is to say about a study, as plain types."""
    with handle.guard():
        study = handle.study
        run = run_of(handle)
        baseline, front, closest = baseline_of(handle), study_front(study), closest_points(study)
        complete, measured, parts = finished(study), measured_trials(study), recorded_parts(study)
        volume = None if baseline is None else hypervolume(kept_points(front), baseline)
        images = 0 if baseline is None else baseline.accuracy.images
        tuned = load_finetuned(study)
        counts = {state.name.lower(): len(finished(study, state)) for state in (TrialState.PRUNED, TrialState.FAIL)}
    return {
        "study": handle.name,
        "storage": handle.shown_url,
        "model": run.get("model"),
        "target": run.get("target"),
        "device": parts.get("device"),
        "figures": _figures(baseline, "device" in parts),
        "trials": {
            "complete": len(complete),
            "pruned": counts["pruned"],
            "failed": counts["fail"],
            "infeasible": sum(not is_feasible(trial) for trial in measured),
            "stopped_early": len(measured) - len(complete),
        },
        # Made, and what they would have been without early stopping.
        "image_evaluations": {
            "made": sum(trial.user_attrs.get("images", images) for trial in measured),
            "without_early_stopping": images * len(measured),
        },
        "constraints": run.get("limits", {}),
        "baseline": None if baseline is None else baseline_document(baseline),
        "front": [point_document(point) for point in kept_points(front)],
        # On the front as the search saw it, dominated by the second measurement.
        "dropped": [point_document(point) for point in front if point not in kept_points(front)],
        "finetuned": [_finetuned(tuned[point.trial], point) for point in front if point.trial in tuned],
        "beats_float": None if baseline is None or not front else beats_float(kept_points(front), baseline),
        "closest": [point_document(point) for point in closest],
        "hypervolume": volume,
        "bound": _bound(study.user_attrs.get(_BOUND), volume),
        "seconds": {**run.get("seconds", {}), **_medians(measured)},
    }


def _figures(baseline: Measurement | None, away: bool) -> dict[str, str]:
    """Where each kind of figure comes from."""
    modelled = baseline is not None and baseline.latency.source == "modelled"
    latency = "modelled: the sum of kernel times that were measured on the device" if modelled else "measured"
    return {"latency_ms": latency, "peak_bytes": "counted", "top1_loss_pp": "measured on this machine" if away else "measured"}


def baseline_document(baseline: Measurement) -> dict[str, Any]:
    """What was measured of the float module."""
    accuracy = baseline.accuracy
    return {
        "latency_ms": baseline.latency.median_ms,
        "latency_source": baseline.latency.source,
        "peak_bytes": baseline.memory.peak_bytes,
        "top1": accuracy.top1,
        "top5": accuracy.top5,
        "images": accuracy.images,
        "metric": accuracy.metric,
    }


def _bound(recorded: Mapping[str, Any] | None, volume: float | None) -> dict[str, Any] | None:
    """How far the front is from what the planner's tables imply; None in a study that was not planned with tables.

    Returns:
        hypervolume: that of the front which the tables predict; share: the measured front's over it; trials: measured
        trials that had corrected the tables.
    """
    if recorded is None or volume is None:
        return None
    predicted = recorded["hypervolume"]
    return {"hypervolume": predicted, "share": volume / predicted if predicted > 0 else None, "trials": recorded["trials"]}


def point_document(point: FrontPoint) -> dict[str, Any]:
    """A configuration and what was measured of it."""
    measured, heldout = point.measurement, point.heldout
    return {
        "trial": point.trial,
        "latency_ms": measured.latency.median_ms,
        "latency_spread_ms": measured.latency.spread_ms,
        "latency_source": measured.latency.source,
        "noisy_timing": measured.latency.noisy,
        "peak_bytes": measured.memory.peak_bytes,
        "top1_loss_pp": measured.accuracy.top1_loss_pp,
        "top1_loss_ci_pp": list(measured.accuracy.top1_loss_ci_pp),
        "heldout": None
        if heldout is None
        else {
            "top1_loss_pp": heldout.accuracy.top1_loss_pp,
            "top1_loss_ci_pp": list(heldout.accuracy.top1_loss_ci_pp),
            "images": heldout.accuracy.images,
            "latency_ms": heldout.latency.median_ms,
            "latency_spread_ms": heldout.latency.spread_ms,
            "noisy_timing": heldout.latency.noisy,
            "dominated_by": heldout.dominated_by,
        },
        "config": point.config.to_json(),
    }


def _finetuned(found: FinetunedTrial, untrained: FrontPoint) -> dict[str, Any]:
    """A point after fine-tuning; the point itself is in the front under the same number."""
    same, images = found.agreement
    return point_document(found.point(untrained)) | {"agreement": {"same": same, "images": images}, "training": found.training}


def _medians(measured: Sequence[FrozenTrial]) -> dict[str, float | None]:
    def median(values: Sequence[float]) -> float | None:
        return statistics.median(values) if values else None

    # From the end of one trial to that of the next: of two under way, each would count the other's time as well.
    ends = sorted(trial.datetime_complete for trial in measured if trial.datetime_complete is not None)
    apart = [(late - early).total_seconds() for early, late in pairwise(ends)]
    steps = [trial.user_attrs["measurement"]["seconds"] for trial in measured if "measurement" in trial.user_attrs]
    return {
        "per_trial_median": median(apart),
        "per_trial_without_accuracy_median": median(
            [sum(value for name, value in step.items() if name != "accuracy") for step in steps]
        ),
        "build_median": median([step["build"] for step in steps if "build" in step]),
    }
