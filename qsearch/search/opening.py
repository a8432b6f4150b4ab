"""The planner's first configurations, measured before its tables are there.

Tables take as long as many trials, and to time kernels takes as long as some. Uniform networks, one precision for all layers,
need neither and come first. What a search may soon know then is how plain assignments do, one precision for all layers of a
kind, which is where all layers change at once and sums of single changes are furthest off: the kernels of uniform networks tell
their latencies, and their bytes are known. What they lose is not: so that a precision that the model does not bear cannot crowd
out the others, some are taken for every precision that may be the lowest of a configuration. Where two precisions read the same
values and differ in their weights, there are also mixtures of both: narrow weights only where most weights are spare nearly as
many bytes, and leave the many small layers alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from qsearch.config import QuantConfig
from qsearch.errors import TrialError
from qsearch.measure.measurement import Measurement
from qsearch.qtype import FP32, INT8, PRECISIONS
from qsearch.search.anchors import PREFERRED_MODES, Anchor, plain_assignments, weight_count
from qsearch.search.bound_space import CALIBRATION, BoundSpace
from qsearch.search.constraints import Constraints
from qsearch.search.tables.cost import Cost
from qsearch.search.wanted import Wanted, added_hypervolume, float_scale

__all__ = ["OF_EACH", "choose_opening", "mixed_anchors", "opening_setting", "plain_anchors", "uniform_anchors"]

# The most plain ones whose lowest precision is the same, the uniform one included, and the most mixtures.
OF_EACH = 2
# In a mixture the layers that hold so much of all weights have the narrow ones.
NARROW = 0.9
_RANK = {name: rank for rank, name in enumerate(PRECISIONS)}
# Precision -> the next one with wider weights that reads the same values.
_WIDER = {
    narrow.name: wide.name
    for wide, narrow in itertools.combinations(PRECISIONS.values(), 2)
    if wide.activation == narrow.activation and wide.weight.qmax > narrow.weight.qmax
}


def opening_setting(space: BoundSpace) -> dict[str, Any]:
    """Values of all parameters that are no layer's: those the space's name stands for, or else the best guess."""
    values = space.start_values()
    if space.space.start.calibration is None:
        modes = next((one.values for one in space.settings if one.name == CALIBRATION), ())
        values |= {CALIBRATION: min(modes, key=PREFERRED_MODES.index)} if modes else {}
    return {one.name: values[one.name] for one in space.settings}


def uniform_anchors(space: BoundSpace) -> list[Anchor]:
    """One precision for all layers that may have it, each but float: int8, then narrower ones, then wider ones."""
    names = {name for layer in space.layers for name in layer.values} - {FP32.name}
    byte = _RANK[INT8.name]
    found: dict[str, Anchor] = {}
    for name in sorted(names, key=lambda name: (_RANK[name] < byte, abs(_RANK[name] - byte))):
        row = [one.values.index(name) if name in one.values else len(one.values) - 1 for one in space.layers]
        anchor = _anchor(space, np.array(row))
        found.setdefault(space.config(anchor.values).content_hash(), anchor)
    return list(found.values())


def choose_opening(
    space: BoundSpace, cost: Callable[[QuantConfig], Cost], baseline: Measurement, constraints: Constraints = Constraints()
) -> list[Anchor]:
    """Choose what follows uniform networks: of those with the same lowest precision what would add most if it lost nothing.

    Args:
        space: The search space.
        cost: Configuration -> its cost.
        baseline: The float module.
        constraints: Limits of the front that is wanted; what is beyond them is not chosen.

    Returns:
        At most OF_EACH plain ones, less the uniform one, and OF_EACH mixtures for every precision; first those that would add
        most by themselves.
    """
    scale = float_scale(baseline)
    wanted = Wanted.within(constraints.limits, scale)
    anchors, found, kinds, measured = [], [], [], []
    uniform = {space.config(anchor.values).content_hash() for anchor in uniform_anchors(space)}
    every = [(False, anchor) for anchor in plain_anchors(space)] + [(True, anchor) for anchor in mixed_anchors(space)]
    for is_mixed, anchor in every:
        config = space.config(anchor.values)
        try:
            costs = cost(config)
        except TrialError:
            # It would fail as a trial too.
            continue
        anchors.append(anchor)
        found.append((costs.latency_ms, costs.peak_bytes, 0.0))
        kinds.append((max(_RANK[name] for name in config.precision.values()), is_mixed))
        measured.append(config.content_hash() in uniform)
    points = np.array(found).reshape(-1, 3) / scale
    allowed = (points <= wanted.limits).all(1)
    chosen: list[tuple[int, float, int]] = []
    for kind in sorted(set(kinds)):
        alike = allowed & np.array([one == kind for one in kinds])
        taken = np.flatnonzero(alike & measured).tolist()
        for place in range(len(taken), OF_EACH):
            gains = np.where(alike, added_hypervolume(points[taken], points, wanted.reference), 0.0)
            if not gains.any():
                break
            taken.append(int(gains.argmax()))
            chosen.append((place, -float(gains.max()), taken[-1]))
    return [anchors[k] for _, _, k in sorted(chosen)]


def plain_anchors(space: BoundSpace) -> list[Anchor]:
    """One precision for all layers of a kind: every such assignment."""
    return [_anchor(space, row) for row in plain_assignments(space)]


def mixed_anchors(space: BoundSpace) -> list[Anchor]:
    """The same with narrow weights only where most weights are, and the next wider ones that read the same values elsewhere."""
    plain = plain_anchors(space)
    seen = {space.config(one.values).content_hash() for one in plain}
    heavy = _heaviest(space)
    small = [one for one in space.layers if one.name not in heavy]
    found = []
    for (narrow, wide), one in itertools.product(_WIDER.items(), plain):
        moved = {layer.name: wide for layer in small if one.values.get(layer.name) == narrow and wide in layer.values}
        anchor = Anchor(f"{one.label}, but {wide} for {narrow} in small layers", one.values | moved)
        digest = space.config(anchor.values).content_hash()
        if digest not in seen:
            seen.add(digest)
            found.append(anchor)
    return found


def _heaviest(space: BoundSpace) -> set[str]:
    """The fewest layers that hold NARROW of the weights."""
    counts = {one.name: weight_count(space.graph, space.graph.by_name[one.name]) for one in space.layers}
    found: set[str] = set()
    held, enough = 0, NARROW * sum(counts.values())
    for name in sorted(counts, key=lambda name: -counts[name]):
        if held >= enough:
            break
        found.add(name)
        held += counts[name]
    return found


def _anchor(space: BoundSpace, row: np.ndarray) -> Anchor:
    layers = {one.name: one.values[value] for one, value in zip(space.layers, row, strict=True)}
    kinds = {space.graph.layer_types[name]: precision for name, precision in layers.items()}
    label = ", ".join(f"{kind} {precision}" for kind, precision in sorted(kinds.items()))
    free = {parameter.name for parameter in space.parameters}
    values = {**opening_setting(space), **layers}
    return Anchor(label, {name: value for name, value in values.items() if name in free})
