"""The planner's tables of a network's layers: latency, bytes and divergence at each precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qsearch.config import QuantConfig
from qsearch.measure.measurement import Measurement
from qsearch.search.bound_space import BoundSpace
from qsearch.search.tables.cost import Cost
from qsearch.search.tables.pairwise import PairwiseSum
from qsearch.search.tables.settings import Setting, assignment_config, lowest

__all__ = ["Draft", "Tables", "layer_rows"]


@dataclass(frozen=True)
class Tables:
    """What was measured to plan trials with. Variables are the space's layers, values their precisions.

    Attributes:
        latency: Milliseconds.
        weight_bytes: Bytes.
        divergence: A configuration's calibration, granularity and weight scale -> nats.
        cost: Configuration -> its cost, exactly.
        baseline: The float module.
        settings: The settings that are told apart, the plainest first; latency and weight_bytes are those of the first.
    """

    latency: PairwiseSum
    weight_bytes: PairwiseSum
    divergence: Callable[[QuantConfig], PairwiseSum]
    cost: Callable[[QuantConfig], Cost]
    baseline: Measurement
    settings: tuple[Setting, ...]

    @cached_property
    def storages(self) -> tuple[int, ...]:
        """Of every setting the first one that adds the same: those that hold weights alike run the same kernels."""
        alike = [(*one.added_ms.unary, *one.added_bytes.unary) for one in self.settings]
        return tuple(next(n for n, other in enumerate(alike) if all(map(np.array_equal, other, one))) for one in alike)

    @cached_property
    def latencies(self) -> tuple[PairwiseSum, ...]:
        """Milliseconds in every setting."""
        return tuple(self.latency.plus(one.added_ms) for one in self.settings)

    @cached_property
    def weights(self) -> tuple[PairwiseSum, ...]:
        """Bytes of weights in every setting."""
        return tuple(self.weight_bytes.plus(one.added_bytes) for one in self.settings)


@dataclass(frozen=True)
class Draft:
    """What trials can be planned with while there are no tables yet.

    Attributes:
        cost: Configuration -> its cost, as far as the kernels of uniform networks tell it.
        tables: Makes tables of one setting: costs of layers without their neighbours', and divergences.
    """

    cost: Callable[[QuantConfig], Cost]
    tables: Callable[[], Tables]


def layer_rows(space: BoundSpace, tables: Tables) -> list[dict[str, Any]]:
    """The tables layer by layer, the largest divergence first, in the setting that makes the least of it.

    Returns:
        For every layer and each of its precisions but the first: layer, its position among the layers, precision,
        divergence in nats, and latency_ms and weight_bytes as they differ from the first precision, neighbours staying
        as they are.
    """
    worst = lowest(space)
    found = [tables.divergence(assignment_config(space, setting.values, worst)) for setting in tables.settings]
    divergence = min(found, key=lambda one: float(one(worst[None])[0]))
    rows: list[dict[str, Any]] = [
        {
            "layer": layer.name,
            "position": i,
            "precision": precision,
            "divergence": float(divergence.unary[i][value]),
            "latency_ms": float(tables.latency.unary[i][value] - tables.latency.unary[i][0]),
            "weight_bytes": float(tables.weight_bytes.unary[i][value] - tables.weight_bytes.unary[i][0]),
        }
        for i, layer in enumerate(space.layers)
        for value, precision in enumerate(layer.values)
        if value
    ]
    return sorted(rows, key=lambda row: -row["divergence"])
