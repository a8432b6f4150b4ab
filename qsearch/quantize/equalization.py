"""Cross-layer equalization: give adjacent layers weights of like ranges, without changing what the network computes.

Where a layer's output channel i is read by one other layer only, dividing it by s[i] and multiplying the reader's weights
of that channel by s[i] changes nothing, as long as what lies between commutes with a positive factor: a clip whose lower
end is zero or none, whose upper end then becomes one per channel, and pooling. s = sqrt(r1 / r2) makes the largest
magnitudes r1 of the first layer's channel and r2 of its reader's equal (Nagel et al. 2019, "Data-free quantization through
weight equalization and bias correction", arXiv:1906.04721, section 4.1, eq. 11).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from qsearch.models.graph import Graph, Model, Node, Parameters

__all__ = ["Link", "equalize", "likely_maximum", "links", "reader_weight"]

# Chains of layers are gone over until no factor changes by more, or so often.
CHANGE, SWEEPS = 0.01, 40
# Commute with a positive factor per channel.
_BETWEEN = ("max_pool2d", "avg_pool2d", "flatten")


@dataclass(frozen=True)
class Link:
    """A layer and the only one that reads it.

    Attributes:
        first: The layer.
        second: Its reader.
        between: Names of the nodes on the way, which commute with a positive factor per channel.
    """

    first: Node
    second: Node
    between: tuple[str, ...] = ()


def links(graph: Graph) -> list[Link]:
    """All pairs of layers that can be equalized, in the order of the first."""
    found = []
    for node in graph.layers:
        if node.residual or node.name == graph.output or (node.clip is not None and node.clip[0] not in (0.0, -np.inf)):
            continue
        reader, between = node, list[str]()
        while len(graph.consumers[reader.name]) == 1 and reader.name != graph.output:
            given, reader = reader, graph.consumers[reader.name][0]
            if reader.is_layer:
                # A layer that adds its neighbour's value reads that value unscaled.
                if reader.inputs[0] == given.name and given.name not in reader.inputs[1:]:
                    found.append(Link(node, reader, tuple(between)))
                break
            if reader.op not in _BETWEEN:
                break
            between.append(reader.name)
    return found


def reader_weight(link: Link, weight: np.ndarray) -> np.ndarray:
    """The reader's weights by input channel, a view.

    Args:
        link: The pair.
        weight: float32 (O, I/groups, kh, kw) of `link.second`.

    Returns:
        (groups, O / groups, channels of the first layer / groups, weights that read one channel at one output).
    """
    groups, channels = link.second.conv.groups, link.first.shape[1 if link.first.op == "conv2d" else -1]
    return weight.reshape(groups, len(weight) // groups, channels // groups, -1)


def equalize(model: Model, channel_maximum: Mapping[str, np.ndarray]) -> Model:
    """Equalize all pairs of layers of a model.

    No channel's activations are let grow beyond the largest of their tensor, where those are known: equal weights gain
    nothing that a wider range of activations would not lose again.

    Args:
        model: The model.
        channel_maximum: Node name -> largest magnitude per channel that its value was seen to have, float (C,); may lack nodes.

    Returns:
        A model of the same float outputs, up to rounding. Clips with an upper end are per channel in it.
    """
    pairs = links(model.graph)
    # Magnitudes suffice to find the factors; they are scaled as the weights will be.
    magnitude = {name: np.abs(weight) for name, weight in model.parameters.weight.items()}
    factors = {pair.first.name: np.ones(len(magnitude[pair.first.name]), np.float32) for pair in pairs}
    for _ in range(SWEEPS):
        change = 0.0
        for pair in pairs:
            name = pair.first.name
            step = _step(pair, magnitude, channel_maximum.get(name), factors[name])
            magnitude[name] /= step[:, None, None, None]
            reader_weight(pair, magnitude[pair.second.name])[...] *= _by_group(pair, step)
            factors[name] = factors[name] * step
            change = max(change, float(np.abs(np.log(step)).max()))
        if change < CHANGE:
            break
    parameters, nodes = model.parameters, {node.name: node for node in model.graph.nodes}
    for pair in pairs:
        name = pair.first.name
        parameters, nodes[name] = _scaled(pair, nodes[name], parameters, factors[name])
    return Model(model.name, replace(model.graph, nodes=tuple(nodes.values())), parameters)


def likely_maximum(model: Model) -> dict[str, np.ndarray]:
    """What stands in for the largest magnitudes where no images are to be seen.

    A batch norm's mean and four of its deviations, within the layer's clip.

    Args:
        model: The model.

    Returns:
        Node name -> float64 (C,), for the layers with a batch norm.
    """
    found = {}
    for name, (mean, deviation) in model.parameters.norm.items():
        low, high = model.graph.by_name[name].clip or (-np.inf, np.inf)
        ends = [np.clip(mean.astype(np.float64) + sign * 4.0 * deviation, low, high) for sign in (-1, 1)]
        found[name] = np.abs(ends).max(0)
    return found


def _step(pair: Link, magnitude: Mapping[str, np.ndarray], largest: np.ndarray | None, factor: np.ndarray) -> np.ndarray:
    """By how much to divide the first layer's channels further, float32 (C,)."""
    own = magnitude[pair.first.name]
    r1 = own.reshape(len(own), -1).max(1)
    r2 = reader_weight(pair, magnitude[pair.second.name]).max((1, 3)).reshape(-1)
    live = (r1 > 0) & (r2 > 0)
    step = np.where(live, np.sqrt(r1 / np.where(live, r2, 1)), 1).astype(np.float32)
    if largest is None or not largest.max() > 0:
        return step
    return np.where(live, np.maximum(step, largest / largest.max() / factor), 1).astype(np.float32)


def _by_group(pair: Link, factor: np.ndarray) -> np.ndarray:
    """Factors of the first layer's channels, to be multiplied with `reader_weight`."""
    return factor.reshape(pair.second.conv.groups, 1, -1, 1)


def _scaled(pair: Link, node: Node, parameters: Parameters, factor: np.ndarray) -> tuple[Parameters, Node]:
    """Divide the first layer by the factors and multiply its reader by them."""
    s, name, other = factor, pair.first.name, pair.second.name
    weight, bias, norm = dict(parameters.weight), dict(parameters.bias), dict(parameters.norm)
    weight[name] = weight[name] / s[:, None, None, None]
    bias[name] = bias[name] / s
    weight[other] = (reader_weight(pair, weight[other]) * _by_group(pair, s)).reshape(weight[other].shape)
    if name in norm:
        norm[name] = (norm[name][0] / s, norm[name][1] / s)
    constants = dict(parameters.constants)
    if node.clip is not None and np.isfinite(node.clip[1]):
        high = np.broadcast_to(constants[node.clip_high] if node.clip_high else np.float32(node.clip[1]), s.shape) / s
        constants[f"{name}.clip_high"] = high
        node = replace(node, clip=(node.clip[0], float(high.max())), clip_high=f"{name}.clip_high")
    return replace(parameters, weight=weight, bias=bias, norm=norm, constants=constants), node
