"""High-bias absorption: move what a layer always adds to a channel into the bias of the layer that reads it.

After a batch norm of mean m and deviation d nearly all values of a channel exceed c = max(0, m - 3 d). With a rectifier
between, r(x - c) = r(x) - c wherever x > c, so that c can be taken from the first layer's bias and W c added to its
reader's: the range of the activations shrinks (Nagel et al. 2019, "Data-free quantization through weight equalization and
bias correction", arXiv:1906.04721, section 4.1.3, eq. 15). The float outputs change where x < c, in one value of 700.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qsearch.models.graph import Model, Node, Parameters
from qsearch.quantize.equalization import Link, links, reader_weight

__all__ = ["absorb_high_biases"]

DEVIATIONS = 3.0


def absorb_high_biases(model: Model) -> Model:
    """Absorb the biases of all pairs of layers where that is possible.

    A reader that pads its input sees zeros there which would have to become -c: such pairs are left as they are, and so are
    layers without a rectifier or without batch-norm statistics.

    Args:
        model: The model.

    Returns:
        A model of nearly the same float outputs.
    """
    parameters, nodes = model.parameters, {node.name: node for node in model.graph.nodes}
    for link in links(model.graph):
        node = link.first
        padded = any(link.second.conv.padding) or any(any(nodes[name].pool.padding) for name in link.between)
        if padded or node.clip is None or node.clip[0] != 0.0 or node.name not in parameters.norm:
            continue
        mean, deviation = parameters.norm[node.name]
        shift = np.maximum(0.0, mean - DEVIATIONS * deviation).astype(np.float32)
        if node.clip is not None and np.isfinite(node.clip[1]):
            high = parameters.constants[node.clip_high] if node.clip_high else np.float32(node.clip[1])
            # What always lies beyond the upper end would be left without a range.
            shift = np.minimum(shift, 0.5 * high).astype(np.float32)
        if shift.any():
            parameters, nodes[node.name] = _absorbed(link, nodes[node.name], parameters, shift)
    return Model(model.name, replace(model.graph, nodes=tuple(nodes.values())), parameters)


def _absorbed(link: Link, node: Node, parameters: Parameters, shift: np.ndarray) -> tuple[Parameters, Node]:
    """Take float32 (C,) from the first layer's bias and give it to its reader's."""
    name, other = link.first.name, link.second.name
    bias, norm, constants = dict(parameters.bias), dict(parameters.norm), dict(parameters.constants)
    bias[name] = bias[name] - shift
    groups = link.second.conv.groups
    gained = np.einsum("gocx,gc->go", reader_weight(link, parameters.weight[other]), shift.reshape(groups, -1))
    bias[other] = bias[other] + gained.reshape(-1)
    norm[name] = (norm[name][0] - shift, norm[name][1])
    assert node.clip is not None
    if np.isfinite(node.clip[1]):
        high = (constants[node.clip_high] if node.clip_high else np.float32(node.clip[1])) - shift
        constants[f"{name}.clip_high"] = high.astype(np.float32)
        node = replace(node, clip=(node.clip[0], float(high.max())), clip_high=f"{name}.clip_high")
    return replace(parameters, bias=bias, norm=norm, constants=constants), node
