"""The first configurations of a study: the corners of the space and a few plain mixtures between them.

Samplers that treat every layer as a knob of its own need hundreds of trials to find out that whole groups of
layers belong together; two dozen such configurations in front spare them that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna

from qsearch.models.graph import Graph, Node
from qsearch.qtype import UNSCALED
from qsearch.search.bound_space import CALIBRATION, GRANULARITY, BoundSpace, LogRange

__all__ = ["PREFERRED_MODES", "Anchor", "enqueue", "enqueue_anchors", "make_anchors", "plain_assignments", "weight_count"]

SHARES = (0.25, 0.5, 0.75)
# Calibrations for the mixtures, best guess first: those that weigh clipping against rounding.
PREFERRED_MODES = ("mse", "percentile", "kl_divergence", "max", "global_scale")
_ENQUEUED = "anchors_enqueued"


@dataclass(frozen=True)
class Anchor:
    """A named starting point.

    Attributes:
        label: What it is, for notes and reports.
        values: Parameter name -> value, for every parameter of the space.
    """

    label: str
    values: dict[str, Any]


def weight_count(graph: Graph, layer: Node) -> int:
    """Number of weights of a layer, bias excepted."""
    assert layer.conv is not None
    inputs = graph.by_name[layer.inputs[0]].shape[1 if layer.op == "conv2d" else -1]
    outputs = layer.shape[1 if layer.op == "conv2d" else -1]
    return outputs * (inputs // layer.conv.groups) * math.prod(layer.conv.kernel)


def make_anchors(space: BoundSpace) -> list[Anchor]:
    """Choose the starting points of a space, about twenty, always the same.

    They come in the order of what they teach: the two ends, the calibrations at int8, the other precisions that
    the space opens, mixtures of layers, and last the other granularities.

    Returns:
        Anchors with distinct configurations.
    """
    anchors: dict[str, Anchor] = {}
    for label, values in _candidates(space):
        config = space.config(values)
        anchors.setdefault(config.content_hash(), Anchor(label, values))
    return list(anchors.values())


def enqueue_anchors(study: optuna.Study, space: BoundSpace) -> None:
    """Enqueue the starting points of a study, once in its life."""
    if study.user_attrs.get(_ENQUEUED):
        return
    enqueue(study, make_anchors(space))
    study.set_user_attr(_ENQUEUED, True)


def enqueue(study: optuna.Study, anchors: Iterable[Anchor]) -> None:
    """Enqueue starting points; those that a killed process had enqueued before are not enqueued twice."""
    for anchor in anchors:
        study.enqueue_trial(anchor.values, user_attrs={"anchor": anchor.label}, skip_if_exists=True)


def plain_assignments(space: BoundSpace) -> np.ndarray:
    """Assignments with one precision for all layers of a kind: depthwise convolutions, the others, linear layers.

    Returns:
        Positions in the layers' values, int64 (N, layers); the last one where a layer may not have its kind's precision.
    """
    kinds = [space.graph.layer_types[layer.name] for layer in space.layers]
    names = sorted({name for layer in space.layers for name in layer.values})
    rows = []
    for chosen in itertools.product(names, repeat=len(set(kinds))):
        of_kind = dict(zip(sorted(set(kinds)), chosen, strict=True))
        wanted = [(layer.values, of_kind[kind]) for layer, kind in zip(space.layers, kinds, strict=True)]
        rows.append([values.index(name) if name in values else len(values) - 1 for values, name in wanted])
    return np.unique(np.array(rows), axis=0)


def _candidates(space: BoundSpace) -> Iterator[tuple[str, dict[str, Any]]]:
    names = [layer.name for layer in space.layers]
    modes, granularities = (_values(space, CALIBRATION), _values(space, GRANULARITY))
    first, others = granularities[0], granularities[1:]
    yield "all fp32", _values_of(space, set(), {})
    for mode in modes:
        yield f"all int8, {mode}, {first}", _values_of(space, set(names), {CALIBRATION: mode, GRANULARITY: first})
    mode = min(modes, key=PREFERRED_MODES.index)
    for precision in sorted({value for layer in space.layers for value in layer.values} - {"fp32", "int8"}):
        # What is clipped to spare an 8-bit value its rounding error is lost to a 16-bit one for nothing.
        widest = "max" if precision in (*UNSCALED, "int16") and "max" in modes else mode
        chosen = {CALIBRATION: widest, GRANULARITY: first}
        yield f"all {precision}, {widest}, {first}", _values_of(space, set(names), chosen, precision)
    for label, lowered in _mixtures(space):
        yield label, _values_of(space, lowered, {CALIBRATION: mode, GRANULARITY: first})
    for granularity in others:
        for mode in modes:
            chosen = {CALIBRATION: mode, GRANULARITY: granularity}
            yield f"all int8, {mode}, {granularity}", _values_of(space, set(names), chosen)


def _mixtures(space: BoundSpace) -> Iterator[tuple[str, set[str]]]:
    """Labels and the layers lowered to int8; the others stay as precise as they may be."""
    graph = space.graph
    names = [layer.name for layer in graph.layers]
    depthwise = {layer.name for layer in graph.layers if layer.is_depthwise}
    by_size = sorted(names, key=lambda name: -weight_count(graph, graph.by_name[name]))
    yield "int8, first and last layer fp32", set(names[1:-1])
    yield "int8, depthwise fp32", set(names) - depthwise
    yield "int8, linear fp32", set(graph.convolutions)
    for share in SHARES:
        count = round(share * len(names))
        percent = round(100 * share)
        yield f"int8 in the {percent} % of layers with most weights", set(by_size[:count])
        yield f"int8 in the last {percent} % of layers", set(names[len(names) - count :])
        yield f"int8 in the first {percent} % of layers", set(names[:count])


def _values(space: BoundSpace, name: str) -> tuple[Any, ...]:
    return next(one.values for one in space.settings if one.name == name)


def _values_of(space: BoundSpace, lowered: set[str], settings: dict[str, Any], precision: str = "int8") -> dict[str, Any]:
    """A value for every parameter: fp32 outside `lowered` and `precision` inside, or what comes nearest of the allowed."""
    values: dict[str, Any] = {}
    for one in space.settings:
        middle = one.values[len(one.values) // 2] if isinstance(one, LogRange) else one.values[0]
        values[one.name] = settings.get(one.name, middle)
    for layer in space.layers:
        inside = precision if precision in layer.values else layer.values[-1]
        values[layer.name] = inside if layer.name in lowered else layer.values[0]
    free = {parameter.name for parameter in space.parameters}
    return {name: value for name, value in values.items() if name in free}
