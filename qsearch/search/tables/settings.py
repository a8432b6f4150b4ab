"""Settings: combinations of a space's parameters that are no layer's, and which of them the planner tells apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qsearch.config import QuantConfig
from qsearch.search.bound_space import CALIBRATION, GRANULARITY, PERCENTILE_TAIL, WEIGHTS, BoundSpace, LogRange
from qsearch.search.tables.cost_fit import pairs_around
from qsearch.search.tables.pairwise import PairwiseSum
from qsearch.search.tables.sensitivity_table import Sensitivity, integer_pairs

__all__ = [
    "Setting",
    "TableKey",
    "assignment_config",
    "assignment_values",
    "chosen_settings",
    "lowest",
    "measured_settings",
    "storage",
    "table_key",
    "table_settings",
]

# Points of the percentile's range that are told apart.
TAILS = 3
# Combinations that the planner tells apart; of many, so many for their predicted divergence.
MOST_SETTINGS, BEST_SETTINGS = 40, 32
# Ways of deriving ranges, or of rounding weights, that are measured.
MOST_WAYS = 64
# What the parameters decide, by their names without a rule's prefix; the others change the model.
_OF_RANGES = (CALIBRATION, PERCENTILE_TAIL, "activations")
_OF_WEIGHTS = (*WEIGHTS, "bias_correction")
# Scales of groups, offsets and channels clipped one by one have kernels and bytes of their own.
_OF_STORAGE = (GRANULARITY, "weight_symmetry", "equalization", "bias_absorption")

# Which table the divergences of a configuration are in.
TableKey = tuple[bool, bool]


@dataclass(frozen=True)
class Setting:
    """A setting that the planner tells apart.

    Attributes:
        values: Parameter name -> value.
        added_ms: What it adds to the latency of layers, beside the plainest setting; no pairs.
        added_bytes: The same of bytes.
    """

    values: Mapping[str, Any]
    added_ms: PairwiseSum
    added_bytes: PairwiseSum


def table_key(config: QuantConfig) -> TableKey:
    """Which table a configuration's divergences are in: equalized networks have one of their own.

    Absorbed biases and migrated ranges change single layers only; what they do is left to the trials to find out.
    """
    return config.equalization, config.calibration.mode == "global_scale"


def storage(setting: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What of a setting kernels and bytes depend on: (parameter, value), by name."""
    return tuple(sorted((name, value) for name, value in setting.items() if name.endswith(_OF_STORAGE)))


def measured_settings(space: BoundSpace) -> list[dict[str, Any]]:
    """Settings in which divergences are measured: those of `table_settings`, if they are all there are.

    Else ones in which every way of deriving ranges and every way of rounding weights occurs. What either moves of the
    outputs is added, so that all combinations of the two are then known.
    """
    found = table_settings(space)
    if _are_all(space):
        return found
    values = _values(space)
    ranges = _ways(values, [name for name in values if name.endswith(_OF_RANGES)])
    weights = _ways(values, [name for name in values if name.endswith(_OF_WEIGHTS)])
    first = {name: one[0] for name, one in values.items()}
    chosen: list[dict[str, Any]] = []
    for equalized in values["equalization"]:
        for without_images in (False, True):
            here = [one for one in ranges if (one.get(CALIBRATION, first[CALIBRATION]) == "global_scale") == without_images]
            if not here:
                continue
            # Without images weights are seldom rounded any other way than the plainest.
            ways = [one for one in weights if not without_images or len(one.items() - first.items()) <= 1]
            for n in range(max(len(here), len(ways))):
                chosen.append({**first, "equalization": equalized, **here[n % len(here)], **ways[n % len(ways)]})
    return _distinct(space, chosen)


def chosen_settings(space: BoundSpace, tables: Mapping[TableKey, Sensitivity]) -> list[dict[str, Any]]:
    """The settings that the planner tells apart: those of `table_settings`, if they are all there are.

    Else the plainest, and for every precision those that promise the least divergence among the ones that cost the same.

    Args:
        space: The search space.
        tables: Divergences in `measured_settings`.
    """
    plain = table_settings(space)
    if _are_all(space):
        return plain
    best = [plain[0]]
    ranked = _ranked(space, tables)
    for place in range(BEST_SETTINGS):
        best += [one[place] for one in ranked if place < len(one)]
    best = _distinct(space, best)[:BEST_SETTINGS]
    return _distinct(space, [*best, *(one for one in plain if _is_measured(space, one, tables))])[:MOST_SETTINGS]


def _ranked(space: BoundSpace, tables: Mapping[TableKey, Sensitivity]) -> list[list[dict[str, Any]]]:
    """For every integer precision, the best setting of every `storage`, that with the least divergence first."""
    by_range: dict[tuple[TableKey, str], dict[str, Any]] = {}
    by_weight: dict[tuple[TableKey, str], dict[str, Any]] = {}
    for setting in measured_settings(space):
        config = assignment_config(space, setting, lowest(space))
        key = table_key(config)
        others = {name: value for name, value in setting.items() if not name.endswith(_OF_WEIGHTS)}
        by_range.setdefault((key, config.ranges_key()), others)
        of_weights = {name: value for name, value in setting.items() if name.endswith(_OF_WEIGHTS)}
        by_weight.setdefault((key, config.weights_key()), of_weights)
    layers = {layer.name: layer.values for layer in space.layers}
    pairs, names, around = integer_pairs(layers), list(layers), pairs_around(space.graph, layers)
    ranked = []
    for precision in sorted({name for _, name in pairs}):
        of = [pair for pair in pairs if pair[1] == precision]
        found: dict[tuple[tuple[str, Any], ...], tuple[float, dict[str, Any]]] = {}
        for key, table in tables.items():
            place = {layer: n for n, (layer, _) in enumerate(of)}
            coupled = [(place[names[i]], place[names[j]]) for i, j in around if names[i] in place and names[j] in place]
            totals = table.totals(of, coupled)
            for (i, ranges), (j, weights) in itertools.product(enumerate(table.range_keys), enumerate(table.weight_keys)):
                setting = by_range[key, ranges] | by_weight[key, weights]
                one = float(totals[i, j]), setting
                found[storage(setting)] = min(found.get(storage(setting), one), one, key=lambda pair: pair[0])
        ranked.append([setting for _, setting in sorted(found.values(), key=lambda pair: pair[0])])
    return ranked


def _is_measured(space: BoundSpace, setting: Mapping[str, Any], tables: Mapping[TableKey, Sensitivity]) -> bool:
    config = assignment_config(space, setting, lowest(space))
    table = tables.get(table_key(config))
    return table is not None and config.ranges_key() in table.range_keys and config.weights_key() in table.weight_keys


def _ways(values: Mapping[str, Sequence[Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Combinations of some parameters: all of them, or the plainest."""
    some = {name: values[name] for name in names}
    if math.prod(len(one) for one in some.values()) <= MOST_WAYS:
        return [dict(zip(some, chosen, strict=True)) for chosen in itertools.product(*some.values())]
    return list(itertools.islice(_some(some), MOST_WAYS))


def _values(space: BoundSpace) -> dict[str, Sequence[Any]]:
    """Values of the parameters that are no layer's, the percentile's range at a few points."""
    values: dict[str, Sequence[Any]] = {}
    for one in space.settings:
        values[one.name] = one.values
        if isinstance(one, LogRange):
            values[one.name] = [float(value) for value in np.geomspace(one.low, one.high, TAILS)]
    return values


def _are_all(space: BoundSpace) -> bool:
    """Whether `table_settings` are all settings that there are."""
    return len(_every(space)) > 0


def _every(space: BoundSpace) -> list[dict[str, Any]]:
    """All settings, or none if they are too many to be told apart."""
    values = _values(space)
    if math.prod(len(one) for one in values.values()) > 8 * MOST_SETTINGS:
        return []
    found = _distinct(space, (dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())))
    return found if len(found) <= MOST_SETTINGS else []


def table_settings(space: BoundSpace) -> list[dict[str, Any]]:
    """Combinations of the parameters that are no layer's, the percentile's range at a few points.

    All of them, if they are not too many; else the first choices, every other choice beside first ones, and then random
    combinations, the same for the same space.
    """
    return _every(space) or _distinct(space, _some(_values(space)))[:MOST_SETTINGS]


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
