"""Diagnoses made up of plain numbers."""

from __future__ import annotations

from collections.abc import Sequence

from qsearch.config import QuantConfig
from qsearch.measure.measurement import Accuracy, Memory
from qsearch.search.diagnosis.candidates import Candidate
from qsearch.search.diagnosis.diagnosis import Coverage, Diagnosis, first_remedy
from qsearch.search.diagnosis.layer_errors import LayerError
from qsearch.search.diagnosis.remedies import Remedies, Remedy
from qsearch.search.diagnosis.values import Clipped, DeadChannels


def accuracy(loss: float, divergence: float, half: float = 1.0) -> Accuracy:
    return Accuracy(90.0 - loss, 99.0, loss, (loss - half, loss + half), 500, "0" * 64, divergence)


def remedy(
    kind: str, gain: float, *, half: float = 1.0, divergence: float = 0.01, ratio: float = 1.0, not_best: bool = False
) -> Remedy:
    candidate = Candidate(f"{kind} changed", kind, {kind: "changed"}, QuantConfig())
    interval = (gain - half, gain + half)
    return Remedy(candidate, accuracy(5.0 - gain, divergence), gain, interval, ratio, Memory(1000, 500, 10), not_best)


def layer(position: int, precision: str = "int8") -> LayerError:
    if precision == "fp32":
        return LayerError(f"blocks.{position}.conv", position, precision, None, None, None, 60.0, None)
    cost, share = 10.0 ** (position - 5), position / 10
    return LayerError(f"blocks.{position}.conv", position, precision, cost, 30.0 - position, 28.0, 20.0 - position, share)


def diagnosis(layers: Sequence[LayerError], remedies: Remedies, loss: float = 5.0) -> Diagnosis:
    costly = sorted(layers, key=lambda one: one.divergence or 0.0, reverse=True)
    clipped = (Clipped("blocks.1.conv", 0.1234, -1.0, 3.0, -2.0, 9.0),)
    dead = (DeadChannels("blocks.0.conv", "zero_weights", (1, 2), 16), DeadChannels("blocks.1.conv", "constant", (3,), 8))
    coverage = Coverage(128, 10, 20, {"blocks.1.conv": 0.5}, ("the 128 calibration images show 10 of the 20 classes",))
    found = (tuple(costly), 8, clipped, dead, coverage, remedies, first_remedy(remedies), 12.0)
    return Diagnosis(QuantConfig(granularity="layer_wise"), accuracy(loss, 0.2), Memory(1000, 500, 10), *found)
