"""The Pareto front of a study: its points, its hypervolume, one pick from it, its verdict on held-out images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import moocore
import numpy as np
import optuna
from optuna.trial import FrozenTrial

from qsearch.config import QuantConfig
from qsearch.errors import StudyError, UsageError
from qsearch.measure.measurement import Accuracy, Latency, Measurement, Memory
from qsearch.search.constraints import is_feasible, violation
from qsearch.search.study import LOSS_BOUND_PP
from qsearch.search.study_trials import finished

__all__ = [
    "FLOAT_TRIAL",
    "LOSS_BOUND_PP",
    "FrontPoint",
    "Heldout",
    "Pick",
    "accuracy_from_json",
    "beats_float",
    "closest_points",
    "float_point",
    "hypervolume",
    "kept_points",
    "load_heldout",
    "measurement_from_json",
    "objective_hypervolume",
    "pick",
    "record_heldout",
    "study_front",
    "study_point",
]

Pick = Literal["knee", "fastest", "smallest", "most-accurate"]
_HELDOUT = "heldout:"
CLOSEST = 3
# In place of a trial number: the float module is no trial.
FLOAT_TRIAL = -1


@dataclass(frozen=True)
class Heldout:
    """What a front member showed when it was measured again.

    Attributes:
        latency: Measured in turn with float.
        accuracy: On images that the search never saw.
        dominated_by: Trial that is no worse in every objective and better in one by these measures; None if none is.
    """

    latency: Latency
    accuracy: Accuracy
    dominated_by: int | None = None


@dataclass(frozen=True)
class FrontPoint:
    """A completed trial that no other one dominates.

    Attributes:
        trial: Its number; FLOAT_TRIAL for the float module.
        config: What was built.
        measurement: What was measured during the search.
        heldout: What a second measurement gave; None until it was made.
    """

    trial: int
    config: QuantConfig
    measurement: Measurement
    heldout: Heldout | None = None

    @property
    def number(self) -> int | None:
        """The trial's number; None for the float module."""
        return None if self.trial == FLOAT_TRIAL else self.trial

    @property
    def objectives(self) -> tuple[float, float, float]:
        """latency_ms, peak_bytes, top1_loss_pp as the search saw them."""
        measured = self.measurement
        return (measured.latency.median_ms, float(measured.memory.peak_bytes), measured.accuracy.top1_loss_pp)

    @property
    def verdict(self) -> tuple[float, float, float]:
        """The objectives as measured again, or as the search saw them where that was not done."""
        if self.heldout is None:
            return self.objectives
        return (self.heldout.latency.median_ms, self.objectives[1], self.heldout.accuracy.top1_loss_pp)


def study_front(study: optuna.Study) -> tuple[FrontPoint, ...]:
    """The non-dominated completed trials within the study's constraints, fastest first; of equal ones the earliest."""
    trials = [trial for trial in finished(study) if "measurement" in trial.user_attrs and is_feasible(trial)]
    if not trials:
        return ()
    values = np.array([trial.values for trial in trials], dtype=np.float64)
    kept = moocore.is_nondominated(values)
    heldout = load_heldout(study)
    points = [_point(trial, heldout.get(trial.number)) for trial, keep in zip(trials, kept, strict=True) if keep]
    return tuple(sorted(points, key=lambda point: (point.objectives, point.trial)))


def closest_points(study: optuna.Study, count: int = CLOSEST) -> tuple[FrontPoint, ...]:
    """The completed trials that violate the constraints least, the closest first; none once a trial is feasible.

    Args:
        study: The study.
        count: How many.
    """
    trials = sorted((trial for trial in finished(study) if "measurement" in trial.user_attrs), key=violation)
    if not trials or is_feasible(trials[0]):
        return ()
    return tuple(_point(trial, None) for trial in trials[:count])


def kept_points(front: Iterable[FrontPoint]) -> tuple[FrontPoint, ...]:
    """The points that no other one dominates by the second measurement; all where there was none."""
    return tuple(point for point in front if point.heldout is None or point.heldout.dominated_by is None)


def float_point(baseline: Measurement) -> FrontPoint:
    """The float module as something to pick."""
    return FrontPoint(FLOAT_TRIAL, QuantConfig(default_precision="fp32"), baseline)


def beats_float(front: Iterable[FrontPoint], baseline: Measurement) -> bool:
    """Whether any point is better than float in any objective: in time beyond its spread, in loss beyond its interval.

    Args:
        front: The points; their second measurement counts where there is one.
        baseline: The float module.
    """
    for point in front:
        again = point.heldout or point.measurement
        faster = again.latency.median_ms + again.latency.spread_ms < baseline.latency.median_ms
        smaller = point.measurement.memory.peak_bytes < baseline.memory.peak_bytes
        if faster or smaller or again.accuracy.top1_loss_ci_pp[1] < 0:
            return True
    return False


def study_point(study: optuna.Study, number: int) -> FrontPoint:
    """A completed trial, on the front or not.

    Raises:
        StudyError: There is no such trial, or it did not complete.
    """
    found = next((trial for trial in finished(study) if trial.number == number and "measurement" in trial.user_attrs), None)
    if found is None:
        raise StudyError(f"study {study.study_name!r} has no completed trial {number}; `front` lists the ones worth exporting")
    return _point(found, load_heldout(study).get(number))


def hypervolume(points: Iterable[FrontPoint], baseline: Measurement) -> float:
    """Share of the useful objective space that a front dominates.

    Latency and bytes are divided by those of float, the loss by LOSS_BOUND_PP; the reference point is (1, 1, 1).
    Losses below zero count as zero, so the value lies between 0 and 1.

    Args:
        points: The front.
        baseline: The float module.
    """
    return objective_hypervolume(np.array([point.objectives for point in points], dtype=np.float64).reshape(-1, 3), baseline)


def objective_hypervolume(objectives: np.ndarray, baseline: Measurement) -> float:
    """Like `hypervolume`, of objectives: latency_ms, peak_bytes, top1_loss_pp; float64 (N, 3)."""
    values = objectives / (baseline.latency.median_ms, float(baseline.memory.peak_bytes), LOSS_BOUND_PP)
    values[:, 2] = np.clip(values[:, 2], 0.0, None)
    inside = values[(values < 1.0).all(axis=1)]
    return float(moocore.hypervolume(inside, ref=np.ones(3))) if len(inside) else 0.0


def pick(
    front: Sequence[FrontPoint], how: str, max_loss_pp: float | None = None, baseline: Measurement | None = None
) -> FrontPoint:
    """Choose one point of a front.

    Held-out measurements count where there are any. The knee is the point nearest to the ideal (each objective
    at its best), with every objective scaled to its range over the front.

    Args:
        front: The points.
        how: 'knee', 'fastest', 'smallest' or 'most-accurate'.
        max_loss_pp: Leave out points that lose more top-1 than this, percentage points.
        baseline: The float module, which is picked if no point beats it in any objective; None never picks it.

    Raises:
        UsageError: There is no such way to pick.
        StudyError: The front is empty, or every point loses more.
    """
    if how not in get_args(Pick):
        raise UsageError(f"no way to pick {how!r}; there are: {', '.join(get_args(Pick))}")
    if not front:
        raise StudyError("the front is empty: no trial has completed yet, or none is within the constraints; search on, or wider")
    points = list(kept_points(front)) or list(front)
    if baseline is not None and not beats_float(points, baseline) and (max_loss_pp is None or max_loss_pp >= 0):
        return float_point(baseline)
    if max_loss_pp is not None:
        least = min(point.verdict[2] for point in front)
        points = [point for point in points if point.verdict[2] <= max_loss_pp]
        if not points:
            raise StudyError(
                f"no point of the front loses {max_loss_pp:g} pp or less; the least is {least:.2f} pp: "
                "raise --max-loss-pp or search on"
            )
    values = np.array([point.verdict for point in points])
    low, high = values.min(axis=0), values.max(axis=0)
    distance = np.linalg.norm((values - low) / np.where(high > low, high - low, 1.0), axis=1)
    keys = {"fastest": values[:, 0], "smallest": values[:, 1], "most-accurate": values[:, 2], "knee": distance}
    # Ties go to the point that is nearer to the ideal.
    return points[int(np.lexsort((distance, keys[how]))[0])]


def record_heldout(study: optuna.Study, front: Sequence[FrontPoint], verdicts: Sequence[tuple[Latency, Accuracy]]) -> None:
    """Keep the second measurement of front members in the study, with who dominates whom by it.

    Args:
        study: The study.
        front: The points that were measured again.
        verdicts: One (latency, held-out accuracy) per point.
    """
    values = [
        (latency.median_ms, point.objectives[1], accuracy.top1_loss_pp)
        for point, (latency, accuracy) in zip(front, verdicts, strict=True)
    ]
    for index, (point, (latency, accuracy)) in enumerate(zip(front, verdicts, strict=True)):
        better = (front[other].trial for other in range(len(front)) if _dominates(values[other], values[index]))
        data = {"latency": vars(latency), "accuracy": vars(accuracy), "dominated_by": next(better, None)}
        study.set_user_attr(f"{_HELDOUT}{point.trial}", data)


def load_heldout(study: optuna.Study) -> dict[int, Heldout]:
    """Trial number -> its second measurement, for the trials that have one."""
    return {
        int(key.removeprefix(_HELDOUT)): Heldout(
            Latency(**data["latency"]), accuracy_from_json(data["accuracy"]), data["dominated_by"]
        )
        for key, data in study.user_attrs.items()
        if key.startswith(_HELDOUT)
    }


def measurement_from_json(data: dict) -> Measurement:
    """The inverse of Measurement.to_json."""
    return Measurement(
        Latency(**data["latency"]),
        Memory(**data["memory"]),
        accuracy_from_json(data["accuracy"]),
        dict(data.get("seconds", {})),
        data.get("kernels_sha256", ""),
    )


def _point(trial: FrozenTrial, heldout: Heldout | None) -> FrontPoint:
    config = QuantConfig.model_validate(trial.user_attrs["config"])
    return FrontPoint(trial.number, config, measurement_from_json(trial.user_attrs["measurement"]), heldout)


def accuracy_from_json(data: dict) -> Accuracy:
    """The inverse of Accuracy's attributes, whose interval JSON makes a list of."""
    low, high = data["top1_loss_ci_pp"]
    return Accuracy(**{**data, "top1_loss_ci_pp": (low, high)})


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and one != other
