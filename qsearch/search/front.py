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
from qsearch.search.study import finished

__all__ = [
    "LOSS_BOUND_PP",
    "FrontPoint",
    "Heldout",
    "Pick",
    "hypervolume",
    "load_heldout",
    "measurement_from_json",
    "pick",
    "record_heldout",
    "study_front",
    "study_point",
]

# The reference point of the hypervolume: as slow as float, as large as float, and this many percentage points
# of top-1 lost. Nothing beyond it is worth having.
LOSS_BOUND_PP = 10.0

Pick = Literal["knee", "fastest", "smallest", "most-accurate"]
_HELDOUT = "heldout:"


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
        trial: Its number.
        config: What was built.
        measurement: What was measured during the search.
        heldout: What a second measurement gave; None until it was made.
    """

    trial: int
    config: QuantConfig
    measurement: Measurement
    heldout: Heldout | None = None

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
    """The non-dominated completed trials, fastest first; of equal ones the earliest."""
    trials = [trial for trial in finished(study) if "measurement" in trial.user_attrs]
    if not trials:
        return ()
    values = np.array([trial.values for trial in trials], dtype=np.float64)
    kept = moocore.is_nondominated(values)
    heldout = load_heldout(study)
    points = [_point(trial, heldout.get(trial.number)) for trial, keep in zip(trials, kept, strict=True) if keep]
    return tuple(sorted(points, key=lambda point: (point.objectives, point.trial)))


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
    scale = (baseline.latency.median_ms, float(baseline.memory.peak_bytes), LOSS_BOUND_PP)
    values = np.array([point.objectives for point in points], dtype=np.float64).reshape(-1, 3) / scale
    values[:, 2] = np.clip(values[:, 2], 0.0, None)
    inside = values[(values < 1.0).all(axis=1)]
    return float(moocore.hypervolume(inside, ref=np.ones(3))) if len(inside) else 0.0


def pick(front: Sequence[FrontPoint], how: str, max_loss_pp: float | None = None) -> FrontPoint:
    """Choose one point of a front.

    Held-out measurements count where there are any. The knee is the point nearest to the ideal (each objective
    at its best), with every objective scaled to its range over the front.

    Args:
        front: The points.
        how: 'knee', 'fastest', 'smallest' or 'most-accurate'.
        max_loss_pp: Leave out points that lose more top-1 than this, percentage points.

    Raises:
        UsageError: There is no such way to pick.
        StudyError: The front is empty, or every point loses more.
    """
    if how not in get_args(Pick):
        raise UsageError(f"no way to pick {how!r}; there are: {', '.join(get_args(Pick))}")
    if not front:
        raise StudyError("the front is empty: no trial has completed yet; run a search first")
    points = [point for point in front if point.heldout is None or point.heldout.dominated_by is None] or list(front)
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
        int(key.removeprefix(_HELDOUT)): Heldout(Latency(**data["latency"]), _accuracy(data["accuracy"]), data["dominated_by"])
        for key, data in study.user_attrs.items()
        if key.startswith(_HELDOUT)
    }


def measurement_from_json(data: dict) -> Measurement:
    """The inverse of Measurement.to_json."""
    return Measurement(
        Latency(**data["latency"]),
        Memory(**data["memory"]),
        _accuracy(data["accuracy"]),
        dict(data.get("seconds", {})),
        data.get("kernels_sha256", ""),
    )


def _point(trial: FrozenTrial, heldout: Heldout | None) -> FrontPoint:
    config = QuantConfig.model_validate(trial.user_attrs["config"])
    return FrontPoint(trial.number, config, measurement_from_json(trial.user_attrs["measurement"]), heldout)


def _accuracy(data: dict) -> Accuracy:
    low, high = data["top1_loss_ci_pp"]
    return Accuracy(**{**data, "top1_loss_ci_pp": (low, high)})


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and one != other
