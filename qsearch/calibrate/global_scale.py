"""Calibration mode global_scale: ranges from the model alone, no images."""

from __future__ import annotations

import numpy as np

from qsearch.models.graph import Node, Parameters

__all__ = ["data_free_range"]

Range = tuple[float, float]

_DEVIATIONS = 4.0
# Smallest values of the functions that bend below zero and rise from there on.
_MINIMA = {"hardswish": -0.375, "silu": -0.27847, "gelu": -0.16998}
_BOUNDED: dict[str, Range] = {"sigmoid": (0.0, 1.0), "hardsigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0), "relu6": (0.0, 6.0)}


def data_free_range(node: Node, inputs: list[Range], parameters: Parameters, input_range: Range, global_scale: float) -> Range:
    """Derive the range of a node from those of its inputs.

    A folded batch norm tells the mean and deviation its layer had in training; nearly all values lie within
    four deviations (Nagel et al. 2019, "Data-free quantization through weight equalization and bias
    correction", arXiv:1906.04721, section 4.1). Other operations follow by interval arithmetic, and what no rule
    bounds is taken to lie within +-global_scale. The node's clip is left to the caller.

    Args:
        node: The node.
        inputs: (low, high) of its inputs, each with low <= 0 <= high.
        parameters: Of the model; the batch-norm statistics are used.
        input_range: (low, high) of the preprocessed images.
        global_scale: Assumed largest magnitude, in the values' unit.

    Returns:
        (low, high).
    """
    if node.op == "input":
        return input_range
    if node.is_layer:
        own = _layer_range(node, parameters, global_scale)
        return _sum([own, inputs[-1]]) if node.residual else own
    if node.op == "add":
        return _sum(inputs)
    if node.op == "mul":
        products = [a * b for a in inputs[0] for b in inputs[1]]
        return min(products), max(products)
    if node.op == "concat":
        return min(low for low, _ in inputs), max(high for _, high in inputs)
    if node.op in ("max_pool2d", "avg_pool2d", "flatten"):
        return inputs[0]
    if node.op == "softmax":
        return 0.0, 1.0
    if node.op == "activation":
        return _activation_range(node.activation, inputs[0])
    return -global_scale, global_scale


def _layer_range(node: Node, parameters: Parameters, global_scale: float) -> Range:
    if node.name not in parameters.norm:
        return -global_scale, global_scale
    mean, deviation = (np.asarray(array, np.float64) for array in parameters.norm[node.name])
    return float((mean - _DEVIATIONS * deviation).min()), float((mean + _DEVIATIONS * deviation).max())


def _sum(ranges: list[Range]) -> Range:
    return sum(low for low, _ in ranges), sum(high for _, high in ranges)


def _activation_range(activation: str | None, given: Range) -> Range:
    low, high = given
    if activation == "relu6":
        return 0.0, min(high, 6.0)
    if activation in _BOUNDED:
        return _BOUNDED[activation]
    if activation == "relu":
        return 0.0, high
    # |f(x)| <= |x| for each of these; a plain clip is applied by the caller.
    return max(low, _MINIMA.get(activation or "", low)), high
