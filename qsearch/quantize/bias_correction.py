"""Bias correction: take the mean of what rounding the weights does to a layer's output out of its bias.

With rounded weights w_q, the output of a layer moves by E[(w_q - w) x] = (w_q - w) E[x] on average, which its bias can
undo (Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", arXiv:1906.04721,
section 4.2, eq. 17). E[x] is measured, or follows from the batch norm before: what was normal becomes a clipped normal
(ibid., appendix C).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from qsearch.calibrate.record import StatisticsRecord
from qsearch.config import BiasCorrection
from qsearch.models.graph import Graph, Model, Node
from qsearch.quantize.weights import QuantizedWeight

__all__ = ["input_means", "mean_error"]


def input_means(model: Model, kind: BiasCorrection, record: StatisticsRecord | None) -> Mapping[str, np.ndarray]:
    """Mean of every layer's input, as far as it is known.

    Args:
        model: The model.
        kind: 'measured' takes the record's means, 'analytic' needs no images; 'none' knows nothing.
        record: Statistics of the model; for 'measured'.

    Returns:
        Layer name -> mean of what each tap of its kernel reads, padding included, float64 (I, kh, kw).
    """
    if kind == "none":
        return {}
    if kind == "measured":
        assert record is not None
        return record.reads
    means = _analytic_means(model)
    layers = [node for node in model.graph.layers if node.inputs[0] in means]
    return {node.name: means[node.inputs[0]][:, None, None] * _coverage(node, model.graph) for node in layers}


def mean_error(weight: np.ndarray, prepared: QuantizedWeight, mean: np.ndarray) -> np.ndarray:
    """How far the mean output falls short when a layer's weights are rounded.

    Args:
        weight: float32 (O, I/groups, kh, kw).
        prepared: Its integer weights.
        mean: Mean of what each tap of the kernel reads, float64 (I, kh, kw).

    Returns:
        float64 (O,), to be added to the bias.
    """
    real = prepared.values.transpose(0, 3, 1, 2) * prepared.scale[:, None, None, None].astype(np.float64)
    groups = len(mean) // weight.shape[1]
    error = (weight - real).reshape(groups, len(weight) // groups, -1)
    return np.einsum("gok,gk->go", error, mean.reshape(groups, -1)).reshape(-1)


def _coverage(node: Node, graph: Graph) -> np.ndarray:
    """Share of the output's places where each tap of the kernel lies on the image, float64 (kh, kw)."""
    given, conv = graph.by_name[node.inputs[0]].shape, node.conv
    if node.op == "linear":
        return np.ones((1, 1))
    sides = []
    for axis in (0, 1):
        places = np.arange(node.shape[2 + axis]) * conv.stride[axis] - conv.padding[axis]
        taps = np.arange(conv.kernel[axis])[:, None] * conv.dilation[axis] + places
        sides.append(((taps >= 0) & (taps < given[2 + axis])).mean(1))
    return np.outer(*sides)


def _analytic_means(model: Model) -> dict[str, np.ndarray]:
    """Mean per channel of every value that follows from batch norms alone."""
    means: dict[str, np.ndarray] = {}
    for node in model.graph.nodes:
        given = [means.get(name) for name in node.inputs]
        known = [one for one in given if one is not None]
        if node.is_layer and node.name in model.parameters.norm and not node.residual:
            center, deviation = (np.asarray(one, np.float64) for one in model.parameters.norm[node.name])
            means[node.name] = clipped_normal_mean(center, deviation, *(node.clip or (-math.inf, math.inf)))
        elif node.is_layer and node.name in model.parameters.norm and node.clip is None and given[-1] is not None:
            means[node.name] = np.asarray(model.parameters.norm[node.name][0], np.float64) + given[-1]
        elif node.op == "add" and node.clip is None and len(known) == 2:
            means[node.name] = known[0] + known[1]
        elif known and _passes_on(node, known[0]):
            means[node.name] = known[0]
    return means


def _passes_on(node: Node, mean: np.ndarray) -> bool:
    """Whether a node's value has the mean of its input."""
    if node.op == "avg_pool2d":
        return not any(node.pool.padding) or not node.pool.count_include_pad
    return node.op in ("view", "flatten") and mean.size == node.shape[2 if len(node.shape) == 3 else 1]


def clipped_normal_mean(mean: np.ndarray, deviation: np.ndarray, low: float, high: float) -> np.ndarray:
    """Mean of a normal variable that is clipped to [low, high]; float64, elementwise.

    Args:
        mean: Of the variable, float64.
        deviation: Its standard deviation, float64, zero included.
        low: May be -inf.
        high: May be inf.
    """
    # A channel that never varied is the limit of one that hardly does.
    spread = np.maximum(deviation, 1e-12)

    def parts(bound: float) -> tuple[np.ndarray, np.ndarray]:
        """Standard normal distribution and density at a bound."""
        at = (bound - mean) / spread
        below = np.array([0.5 * math.erfc(-z / math.sqrt(2)) for z in at.reshape(-1)]).reshape(at.shape)
        return below, np.exp(-0.5 * np.minimum(np.abs(at), 1e3) ** 2) / math.sqrt(2 * math.pi)

    (under_low, density_low), (under_high, density_high) = parts(low), parts(high)
    inside = mean * (under_high - under_low) - spread * (density_high - density_low)
    below = low * under_low if math.isfinite(low) else 0.0
    above = high * (1 - under_high) if math.isfinite(high) else 0.0
    return inside + below + above
