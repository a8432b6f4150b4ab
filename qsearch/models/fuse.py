"""Fuse what one kernel computes: a layer, the residual added to it, the clip that follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from qsearch.models.fold_constants import fold_constants
from qsearch.models.graph import Graph, Node, Parameters
from qsearch.models.select_channels import compose_selections

__all__ = ["fuse"]

Merge = Callable[[Graph, dict[str, Node], Node], tuple[str, Node] | None]


def fuse(graph: Graph, parameters: Parameters) -> tuple[Graph, Parameters]:
    """Fuse residual additions and clips into the layers before them, then drop what nothing reads.

    A fused node keeps the layer's name; its value is the one after the addition and the clip.
    """
    graph = _without_dead(compose_selections(_without_dead(graph)))
    graph, parameters = fold_constants(graph, parameters)
    graph = _fuse_each(graph, _residual_of)
    graph = _fuse_each(graph, _clip_of)
    alive = {node.name for node in graph.layers}
    kept = {field: {k: v for k, v in getattr(parameters, field).items() if k in alive} for field in ("weight", "bias", "norm")}
    read = {name for node in graph.nodes for name in (*node.constants, *(node.foreign.parameters if node.foreign else ()))}
    kept["constants"] = {name: array for name, array in parameters.constants.items() if name in read}
    return graph, replace(parameters, **kept)


def _fuse_each(graph: Graph, merge: Merge) -> Graph:
    """Apply `merge` to every node in order; it gives the name of the node to merge into and the merged node."""
    names: dict[str, str] = {}
    nodes: dict[str, Node] = {}
    for node in graph.nodes:
        node = replace(node, inputs=tuple(names.get(name, name) for name in node.inputs))
        found = merge(graph, nodes, node)
        if found is None:
            nodes[node.name] = node
            continue
        # The merged node moves to the place of the later one: everything it reads comes before.
        target, merged = found
        del nodes[target]
        nodes[target] = merged
        names[node.name] = target
    return Graph(tuple(nodes.values()), names.get(graph.output, graph.output))


def _single_reader(graph: Graph, name: str) -> bool:
    return len(graph.consumers[name]) == 1 and graph.output != name


def _residual_of(graph: Graph, nodes: dict[str, Node], node: Node) -> tuple[str, Node] | None:
    """An addition goes into the later of the two layers it adds, if nothing else reads that layer."""
    if node.op != "add" or node.inputs[0] == node.inputs[1]:
        return None
    order = list(nodes)
    for name in sorted(node.inputs, key=order.index, reverse=True):
        layer = nodes[name]
        if layer.is_layer and not layer.residual and _single_reader(graph, name):
            other = node.inputs[1] if node.inputs[0] == name else node.inputs[0]
            return name, replace(layer, inputs=(*layer.inputs, other), residual=True)
    return None


def _clip_of(graph: Graph, nodes: dict[str, Node], node: Node) -> tuple[str, Node] | None:
    """A clip goes into the layer or addition before it, if nothing else reads that."""
    if node.op != "activation" or node.activation != "clip":
        return None
    before = nodes[node.inputs[0]]
    if not (before.is_layer or before.op == "add") or before.clip or not _single_reader(graph, before.name):
        return None
    return before.name, replace(before, clip=node.clip)


def _without_dead(graph: Graph) -> Graph:
    alive = {graph.output, graph.input.name}
    for node in reversed(graph.nodes):
        if node.name in alive:
            alive.update(node.inputs)
    return Graph(tuple(node for node in graph.nodes if node.name in alive), graph.output)
