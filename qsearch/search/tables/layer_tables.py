"""The planner's tables of a network's layers: latency, bytes and divergence at each precision."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qsearch.config import QuantConfig
from qsearch.measure.measurement import Measurement
from qsearch.search.bound_space import BoundSpace, LogRange
from qsearch.search.tables.cost_table import Cost
from qsearch.search.tables.pairwise import PairwiseSum

__all__ = ["Tables", "assignment_config", "assignment_values", "layer_rows", "lowest", "table_settings"]

# Points of the percentile's range that are told apart.
TAILS = 3
# Combinations of settings that the planner tells apart.
MOST_SETTINGS = 32


@dataclass(frozen=True)
class Tables:
    """What was measured before the first trial. Variables are the space's layers, values their precisions.

    Attributes:
        latency: Milliseconds.
        weight_bytes: Bytes.
        divergence: A configuration's calibration, granularity and weight scale -> nats.
        cost: Configuration -> its cost, exactly.
        baseline: The float module.
    """

    latency: PairwiseSum
    weight_bytes: PairwiseSum
    divergence: Callable[[QuantConfig], PairwiseSum]
    cost: Callable[[QuantConfig], Cost]
    baseline: Measurement


def layer_rows(space: BoundSpace, tables: Tables) -> list[dict[str, Any]]:
    """The tables layer by layer, the largest divergence first, in the setting that makes the least of it.

    Returns:
        For every layer and each of its precisions but the first: layer, its position among the layers, precision,
        divergence in nats, and latency_ms and weight_bytes as they differ from the first precision, neighbours staying
        as they are.
    """
    worst = lowest(space)
    found = [tables.divergence(assignment_config(space, setting, worst)) for setting in table_settings(space)]
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


def table_settings(space: BoundSpace) -> list[dict[str, Any]]:
    """Combinations of the parameters that are no layer's, the percentile's range at a few points.

    All of them, if they are not too many; else the first choices, every other choice beside first ones, and then random
    combinations, the same for the same space.
    """
    values: dict[str, Sequence[Any]] = {}
    for one in space.settings:
        values[one.name] = one.values
        if isinstance(one, LogRange):
            values[one.name] = [float(value) for value in np.geomspace(one.low, one.high, TAILS)]
    if math.prod(len(one) for one in values.values()) <= 8 * MOST_SETTINGS:
        every = _distinct(space, (dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())))
        if len(every) <= MOST_SETTINGS:
            return every
    return _distinct(space, _some(values))[:MOST_SETTINGS]


def _distinct(space: BoundSpace, settings: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of those that mean the same, the first."""
    kept: dict[str, dict[str, Any]] = {}
    for setting in settings:
        kept.setdefault(assignment_config(space, setting, lowest(space)).content_hash(), setting)
    return list(kept.values())


def _some(values: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Some combinations of choices, the plainest first."""
    first = {name: one[0] for name, one in values.items()}
    yield first
    yield from ({**first, name: value} for name, one in values.items() for value in one[1:])
    rng = np.random.default_rng(0)
    for _ in range(8 * MOST_SETTINGS):
        yield {name: one[int(rng.integers(len(one)))] for name, one in values.items()}


def lowest(space: BoundSpace) -> np.ndarray:
    """The assignment of every layer to the last of its precisions, int64 (layers,).

    A setting takes effect there, which it may not where all layers are in fp32.
    """
    return np.array([len(one.values) - 1 for one in space.layers])


def assignment_values(space: BoundSpace, setting: Mapping[str, Any], row: np.ndarray) -> dict[str, Any]:
    """Parameter values of an assignment.

    Args:
        space: The search space.
        setting: One of `table_settings`.
        row: int (layers,), positions among each layer's precisions.
    """
    return {**setting, **{one.name: one.values[value] for one, value in zip(space.layers, row, strict=True)}}


def assignment_config(space: BoundSpace, setting: Mapping[str, Any], row: np.ndarray) -> QuantConfig:
    """The configuration of an assignment; arguments as for `assignment_values`."""
    return space.config(assignment_values(space, setting, row))
