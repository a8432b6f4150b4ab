"""Fold constant factors and shifts into what computes the value: layer scale, embeddings, attention biases."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from qsearch.models.graph import Graph, Node, Parameters

__all__ = ["fold_constants"]


def fold_constants(graph: Graph, parameters: Parameters) -> tuple[Graph, Parameters]:
    """Fold every scale and shift whose input nothing else reads.

    A factor per output channel goes into the weights of the layer before (layer scale); a shift joins the shift
    before it (class token and position embedding), and the softmax after it (relative position bias and mask).
    """
    weight, bias = dict(parameters.weight), dict(parameters.bias)
    parameters = Parameters(weight, bias, dict(parameters.norm), dict(parameters.constants))
    nodes: dict[str, Node] = {}
    names: dict[str, str] = {}
    for original in graph.nodes:
        node = replace(original, inputs=tuple(names.get(name, name) for name in original.inputs))
        # What a merged node's readers see goes by its first name.
        alone = len(node.inputs) == 1 and len(graph.consumers[original.inputs[0]]) == 1 and graph.output != original.inputs[0]
        before = nodes[node.inputs[0]] if alone else None
        if before is not None and node.op == "scale" and before.is_layer and _scaled_layer(parameters, before.name, node):
            names[node.name] = before.name
        elif before is not None and node.op == before.op == "shift":
            nodes[before.name] = _summed_shift(parameters, before, node)
            names[node.name] = before.name
        elif before is not None and node.op == "softmax" and before.op == "shift" and not node.constants:
            del nodes[before.name]
            # Whole rows, so that a row never reads beyond the constant's end.
            parameters.constants[before.constants[0]] = _repeated(parameters.constants[before.constants[0]], node.shape[-1])
            nodes[node.name] = replace(node, inputs=before.inputs, constants=before.constants)
        else:
            nodes[node.name] = node
    return Graph(tuple(nodes.values()), names.get(graph.output, graph.output)), parameters


def _scaled_layer(parameters: Parameters, layer: str, node: Node) -> bool:
    """Multiply a layer's weights and bias, if the factor is one per output channel."""
    factor = parameters.constants[node.constants[0]]
    weight, bias = parameters.weight[layer], parameters.bias[layer]
    if len(factor) not in (1, len(bias)):
        return False
    parameters.weight[layer] = weight * factor[:, None, None, None]
    parameters.bias[layer] = bias * factor
    if layer in parameters.norm:
        mean, deviation = parameters.norm[layer]
        parameters.norm[layer] = mean * factor, deviation * np.abs(factor)
    return True


def _summed_shift(parameters: Parameters, before: Node, node: Node) -> Node:
    """One shift by the sum of two constants, each repeated as often as the other needs."""
    first, second = (parameters.constants[each.constants[0]] for each in (before, node))
    name = f"{before.constants[0]}+"
    parameters.constants[name] = _repeated(first, len(second)) + _repeated(second, len(first))
    return replace(before, constants=(name,))


def _repeated(constant: np.ndarray, length: int) -> np.ndarray:
    """A repeating constant, long enough that `length` divides it."""
    return np.tile(constant, math.lcm(len(constant), length) // len(constant))
