"""Migration: let linear layers' weights take over part of the range of the activations that they read.

Dividing channel j of what a layer norm writes by s[j], and multiplying the weights that read it by s[j], changes nothing.
s[j] = max |x[j]| ** a / max |w[:, j]| ** (1 - a) moves a share of the outliers of single channels, which one scale for all
cannot hold, into the weights (Xiao et al. 2023, "SmoothQuant: accurate and efficient post-training quantization for large
language models", arXiv:2211.10438, eq. 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from qsearch.models.graph import Graph, Model, Node

__all__ = ["migrate"]

# Ratios beyond these are those of channels that carry nothing.
LEAST, MOST = 1e-3, 1e3


def migrate(model: Model, channel_maximum: Mapping[str, np.ndarray], strength: float) -> Model:
    """Migrate at every layer norm that linear layers alone read.

    Args:
        model: The model.
        channel_maximum: Node name -> largest magnitude per channel that its value was seen to have, float (C,).
        strength: a, the share of the range that the weights take over, 0 to 1.

    Returns:
        A model of the same float outputs, up to rounding.
    """
    weight, constants = dict(model.parameters.weight), dict(model.parameters.constants)
    nodes = {node.name: node for node in model.graph.nodes}
    for node in model.graph.nodes:
        readers = _linear_readers(model.graph, node) if node.op == "layer_norm" else []
        if not readers or len(node.constants) != 2:
            continue
        seen = np.asarray(channel_maximum[node.name], np.float64)
        largest = np.max([np.abs(weight[reader.name]).reshape(len(weight[reader.name]), -1).max(0) for reader in readers], 0)
        live = (seen > 0) & (largest > 0)
        ratio = np.where(live, seen, 1.0) ** strength / np.where(live, largest, 1.0) ** (1.0 - strength)
        s = np.clip(ratio, LEAST, MOST).astype(np.float32)
        # Under names of their own: a module that is called twice has its constants twice.
        names = tuple(f"{node.name}.migrated.{i}" for i in range(2))
        for name, given in zip(names, node.constants, strict=True):
            constants[name] = constants[given] / s.reshape(constants[given].shape)
        nodes[node.name] = replace(node, constants=names)
        for reader in readers:
            weight[reader.name] = weight[reader.name] * s[None, :, None, None]
    parameters = replace(model.parameters, weight=weight, constants=constants)
    return Model(model.name, replace(model.graph, nodes=tuple(nodes.values())), parameters)


def _linear_readers(graph: Graph, node: Node) -> list[Node]:
    """The linear layers that read a value over all of its last axis; none if anything else reads it."""
    found: list[Node] = []
    for reader in graph.consumers[node.name]:
        if reader.op == "linear" and reader.inputs[0] == node.name and node.name not in reader.inputs[1:]:
            found.append(reader)
        elif reader.op == "view" and reader.shape[-1] == node.shape[-1] and (further := _linear_readers(graph, reader)):
            found += further
        else:
            return []
    return [] if node.name == graph.output else found
