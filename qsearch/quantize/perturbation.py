"""What quantizing some layers changes in the float network: which reads are rounded, and by how much weights move.

The rounding points are those of the compiled module: they are read off the forms that lowering assigns, so that a
residual that takes its neighbour's bytes, or a lookup table between two layers, is rounded here as it is there.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from qsearch.config import Symmetry, WeightSettings
from qsearch.models.graph import MOVES, Graph, Model
from qsearch.qtype import PRECISIONS, UNSCALED
from qsearch.quantize.affine import Affine
from qsearch.quantize.assign import ROUNDED_FORMS, SHARED, Assignment, assign_forms, kernel_precision
from qsearch.quantize.bias_correction import mean_error
from qsearch.quantize.lower import value_affines
from qsearch.quantize.weight_store import WeightStore

__all__ = ["Edge", "Ranges", "Roundings", "assigned", "quantized_reads", "rounded", "rounded_reads", "weight_change"]

# (Reader's name, position among its inputs).
Edge = tuple[str, int]
# The quantizers that a value passes through, one after the other, on its way to a reader.
Roundings = tuple[Affine, ...]
Ranges = dict[str, tuple[float, float]]
Quantizer = TypeVar("Quantizer", bound=Hashable)

_PICKS = (*SHARED, "concat")


def assigned(graph: Graph, precision: Mapping[str, str]) -> Assignment:
    """The forms of all values where layers not named stay in fp32."""
    return assign_forms(graph, {node.name: precision.get(node.name, "fp32") for node in graph.layers})


def rounded_reads(
    model: Model, assignment: Assignment, ranges: Ranges, weights: WeightStore, symmetry: Symmetry = "asymmetric"
) -> dict[Edge, Roundings]:
    """Every read that sees rounded values under an assignment of forms.

    Args:
        model: The model.
        assignment: The forms.
        ranges: Node name -> (low, high) of its value, for every node.
        weights: Prepared weights.
        symmetry: Of 8-bit values.

    Returns:
        Edge -> what rounds it; edges that read float32 as it was computed are left out.
    """
    return quantized_reads(model.graph, assignment, value_affines(model, assignment, ranges, weights, symmetry))


def quantized_reads(
    graph: Graph, assignment: Assignment, quantizers: Mapping[tuple[str, str], Quantizer]
) -> dict[Edge, tuple[Quantizer, ...]]:
    """Like `rounded_reads`, whatever stands for the quantizer of a value.

    Args:
        graph: The layer graph.
        assignment: The forms.
        quantizers: (Node name, form) -> what rounds that form; equal ones round alike.
    """
    found: dict[Edge, tuple[Quantizer, ...]] = {}
    # Values that an operation only picks from rounded ones: rounding them again with the same scale changes nothing.
    settled: dict[str, Quantizer | None] = {}
    for node in graph.nodes:
        # What is only moved is rounded where it is read in the end.
        if node.op in MOVES:
            continue
        for i, name in enumerate(node.inputs):
            root = _moved_from(graph, name)
            forms = dict.fromkeys((assignment.produced[root], assignment.reads[node.name][i]))
            roundings = tuple(quantizers[root, form] for form in forms if form in ROUNDED_FORMS)
            if roundings and roundings != (settled.get(root),):
                found[node.name, i] = roundings
        if node.op in _PICKS:
            roots = [settled.get(_moved_from(graph, name)) for name in node.inputs]
            last = {found.get((node.name, i), (root,))[-1] for i, root in enumerate(roots)}
            settled[node.name] = last.pop() if len(last) == 1 else None
    return found


def _moved_from(graph: Graph, name: str) -> str:
    while graph.by_name[name].op in MOVES:
        name = graph.by_name[name].inputs[0]
    return name


def rounded(value: Tensor, roundings: Iterable[Affine]) -> Tensor:
    """Quantize and dequantize a value, float32 of the same shape; the value itself where nothing rounds it."""
    for affine in roundings:
        scale, zero = float(affine.scale), affine.zero_point
        if not affine.limits.is_integer:
            kind = torch.float16 if affine.limits.dtype == "float16" else torch.float8_e4m3fn
            value = (value * (1 / scale)).clamp_(affine.limits.qmin, affine.limits.qmax).to(kind).float().mul_(scale)
            continue
        # In place, pass by pass: much faster than torch's own fake quantization, which also keeps a mask.
        value = (value * (1 / scale)).round_().clamp_(affine.limits.qmin - zero, affine.limits.qmax - zero).mul_(scale)
    return value


def weight_change(
    model: Model, pair: tuple[str, str], settings: WeightSettings, weights: WeightStore, mean: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """What quantization changes of a layer's weights and bias.

    16-bit weights are prepared for the layer's own bound on its input; a neighbour that narrows it changes little.
    The rare channel whose scale is raised for the sake of its bias is left as it is.

    Args:
        model: The model.
        pair: The layer and its precision.
        settings: How its weights are rounded.
        weights: Prepared weights.
        mean: Mean of what its kernel reads, float64 (I, kh, kw), if its bias is corrected.

    Returns:
        float32 (O, I/groups, kh, kw) and float32 (O,), to be added.
    """
    name, precision = pair
    weight = model.parameters.weight[name]
    if precision in UNSCALED:
        computing = kernel_precision(precision, model.graph.layer_types[name])
        real = weights.floats(name, weight, computing).astype(np.float32).transpose(0, 3, 1, 2)
        return np.ascontiguousarray(real) - weight, np.zeros(len(weight), np.float32)
    if precision == "int16":
        prepared = weights.bounded(name, weight, settings, weights.activation_limit(name, weight))
    else:
        prepared = weights.quantized(name, weight, settings, PRECISIONS[precision].weight)
    real = prepared.values.astype(np.float32) * prepared.scale[:, None, None, None]
    shift = np.zeros(len(weight)) if mean is None or precision in ("int16", "fp8") else mean_error(weight, prepared, mean)
    return np.ascontiguousarray(real.transpose(0, 3, 1, 2)) - weight, shift.astype(np.float32)
