"""What fine-tuning made of some trials of a study, kept in the study beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna

from qsearch.measure.measurement import Latency, Measurement
from qsearch.search.front import FrontPoint, Heldout, accuracy_from_json, kept_points, measurement_from_json

__all__ = ["FinetunedTrial", "load_finetuned", "record_finetuned", "worth_finetuning"]

_FINETUNED = "finetuned:"


@dataclass(frozen=True)
class FinetunedTrial:
    """A trial's configuration after fine-tuning.

    Attributes:
        trial: The trial's number.
        measurement: Its module, measured as a trial.
        heldout: The same on held-out images.
        agreement: Images on which the module decides as the trained network, and images in all.
        training: What the training was, as plain types; another one gives another result.
    """

    trial: int
    measurement: Measurement
    heldout: Heldout
    agreement: tuple[int, int]
    training: dict[str, Any] = field(default_factory=dict)

    def point(self, untrained: FrontPoint) -> FrontPoint:
        """Its figures as a point, for the same configuration."""
        return FrontPoint(self.trial, untrained.config, self.measurement, self.heldout)


def worth_finetuning(front: Sequence[FrontPoint], count: int) -> tuple[FrontPoint, ...]:
    """The points that have most to gain: those of the largest loss, as it was measured last, that no other one dominates.

    Args:
        front: The front.
        count: How many at most; points that lose nothing are none of them.
    """
    losing = [point for point in kept_points(front) if point.verdict[2] > 0]
    return tuple(sorted(losing, key=lambda point: (-point.verdict[2], point.trial))[:count])


def record_finetuned(study: optuna.Study, found: FinetunedTrial) -> None:
    """Keep what fine-tuning made of a trial, in place of an earlier one."""
    heldout = {"latency": vars(found.heldout.latency), "accuracy": vars(found.heldout.accuracy)}
    data: dict[str, Any] = {"measurement": found.measurement.to_json(), "heldout": heldout, "training": found.training}
    data["agreement"] = list(found.agreement)
    study.set_user_attr(f"{_FINETUNED}{found.trial}", data)


def load_finetuned(study: optuna.Study) -> dict[int, FinetunedTrial]:
    """Trial number -> what fine-tuning made of it, for the trials that were fine-tuned."""
    return {
        (number := int(key.removeprefix(_FINETUNED))): FinetunedTrial(
            number,
            measurement_from_json(data["measurement"]),
            Heldout(Latency(**data["heldout"]["latency"]), accuracy_from_json(data["heldout"]["accuracy"])),
            tuple(data["agreement"]),
            data["training"],
        )
        for key, data in study.user_attrs.items()
        if key.startswith(_FINETUNED)
    }
