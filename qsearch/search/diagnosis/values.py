"""What a configuration's ranges and scales do to values and channels: what is clipped, what is dead, what was never seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qsearch.calibrate.coverage import range_growth
from qsearch.calibrate.histogram import HALF, Histogram
from qsearch.calibrate.record import StatisticsRecord
from qsearch.models.graph import MOVES
from qsearch.quantize.affine import Affine
from qsearch.quantize.assign import SHARED
from qsearch.search.diagnosis.subject import Subject

__all__ = ["Clipped", "DeadChannels", "clipped_share", "clipped_values", "dead_channels", "grown_ranges"]

DEAD = {
    "constant": "the value never changed on the calibration images",
    "zero_weights": "all weights are zero",
    "rounded_away": "all weights became zero by rounding",
}
"""What a dead channel can be, and what that says."""


@dataclass(frozen=True)
class Clipped:
    """A value some of which lie beyond its range.

    Attributes:
        value: Name of the node that computes it.
        share: Share of the recorded values that lie beyond, 0 to 1.
        low: Least real number that its integers hold.
        high: Largest one.
        minimum: Smallest recorded value.
        maximum: Largest one.
    """

    value: str
    share: float
    low: float
    high: float
    minimum: float
    maximum: float


@dataclass(frozen=True)
class DeadChannels:
    """Output channels of a layer that carry nothing.

    Attributes:
        layer: The layer.
        kind: One of `DEAD`.
        channels: Which.
        of: How many the layer has.
    """

    layer: str
    kind: str
    channels: tuple[int, ...]
    of: int


def clipped_values(subject: Subject) -> list[Clipped]:
    """The values that are clipped under a configuration, most first, by the calibration images' record."""
    found = []
    # Not every value that has a scale is ever written in integers.
    written = {tuple(op.output.name.rsplit(":", 1)) for op in subject.program.ops if op.output.dtype != "float32"}
    for (name, form), affine in subject.affines.items():
        if (name, form) not in written or subject.model.graph.by_name[name].op in (*MOVES, *SHARED):
            # Their bytes are those of what they read, which is listed.
            continue
        tensor = subject.record.tensors[name]
        low, high = _ends(affine)
        share = clipped_share(tensor.histogram, affine)
        if share > 0:
            found.append(Clipped(name, share, low, high, tensor.minimum, tensor.maximum))
    return sorted(found, key=lambda one: one.share, reverse=True)


def _ends(affine: Affine) -> tuple[float, float]:
    """The least and the largest real number that a tensor's integers hold."""
    ends = (affine.limits.qmin - affine.zero_point, affine.limits.qmax - affine.zero_point)
    return float(affine.scale) * ends[0], float(affine.scale) * ends[1]


def clipped_share(histogram: Histogram, affine: Affine) -> float:
    """Share of values that lie further beyond a range than rounding would move them, counted in whole bins.

    Args:
        histogram: Of the values.
        affine: The range; half a step beyond its ends is still rounded to them.

    Returns:
        0 to 1; a bin that the end cuts counts as inside, so that it is the least that the share can be.
    """
    low, high = _ends(affine)
    half, edges = float(affine.scale) / 2, np.arange(-HALF, HALF + 1) * histogram.width
    beyond = (edges[:-1] >= high + half) | (edges[1:] <= low - half)
    return float(histogram.counts[beyond].sum() / max(histogram.count, 1))


def dead_channels(subject: Subject) -> list[DeadChannels]:
    """The dead output channels of all layers, in the order of the network; a channel is listed by its first cause."""
    found = []
    for name, op in subject.layer_ops.items():
        weight, tensor = subject.model.parameters.weight[name], subject.record.tensors[name]
        zero = ~weight.reshape(len(weight), -1).any(1)
        # Of weights with an offset, integers that are all zero still stand for something.
        tables = [op.constants[key] for key in ("weight", "group_offset") if key in op.constants]
        whole = [(table.reshape(len(weight), -1) != 0).any(1) for table in tables]
        rounded = ~np.any(whole, 0) & ~zero
        constant = (tensor.channel_minimum == tensor.channel_maximum) & ~zero
        for kind, dead in (("zero_weights", zero), ("rounded_away", rounded), ("constant", constant & ~rounded)):
            if dead.any():
                found.append(DeadChannels(name, kind, tuple(np.flatnonzero(dead).tolist()), len(weight)))
    return found


def grown_ranges(record: StatisticsRecord, count: int = 5) -> Mapping[str, float]:
    """The values whose ranges the second half of the calibration images widened most, by what share; of one image none."""
    if record.images < 2:
        return {}
    growth = range_growth(record)
    return {name: growth[name] for name in sorted(growth, key=lambda one: -growth[one])[:count] if growth[name] > 0}
