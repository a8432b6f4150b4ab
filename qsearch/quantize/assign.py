"""Decide, from the layers' precisions, which form every value of the graph is held in.

A value is produced once in the form that its readers want and converted only where readers disagree. An
operation that is not a layer runs in integers if everything it reads comes out of integer arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from qsearch.models.graph import Graph, Node
from qsearch.qtype import PRECISIONS

__all__ = ["FIRST", "FLOAT", "Assignment", "UINT8_FORM", "assign_forms"]

# The forms of a value: uint8 channels last, float32 channels last, float32 channels first (foreign operators).
UINT8_FORM, FLOAT, FIRST = "uint8", "float32", "float32_first"
# Operations whose kernel can turn float32 into uint8, or uint8 into float32, while storing.
CONVERTING = ("conv2d", "linear", "add", "mul", "avg_pool2d", "input")


@dataclass(frozen=True)
class Assignment:
    """Forms of every node's value and of everything it reads.

    Attributes:
        integer: Nodes that compute in integers.
        reads: Node name -> form in which it reads each of its inputs.
        produced: Node name -> form in which its own operation writes its value.
        wanted: Node name -> forms that must exist.
    """

    integer: frozenset[str]
    reads: dict[str, tuple[str, ...]]
    produced: dict[str, str]
    wanted: dict[str, frozenset[str]]


def assign_forms(graph: Graph, precision: dict[str, str]) -> Assignment:
    """Assign forms.

    Args:
        graph: The layer graph.
        precision: Layer name -> precision name, for every layer.
    """
    integer = _integer_nodes(graph, precision)
    reads = {node.name: list(_reads(node, integer)) for node in graph.nodes}
    wanted: dict[str, set[str]] = {node.name: set() for node in graph.nodes}
    wanted[graph.output].add(FLOAT)
    for node in graph.nodes:
        for name, form in zip(node.inputs, reads[node.name], strict=True):
            if form:
                wanted[name].add(form)
    # A residual takes whatever exists; uint8 before float32, as it is the smaller.
    for node in graph.nodes:
        for i, name in enumerate(node.inputs):
            if not reads[node.name][i]:
                reads[node.name][i] = UINT8_FORM if UINT8_FORM in wanted[name] else FLOAT
                wanted[name].add(reads[node.name][i])
    produced = {node.name: _produced(node, node.name in integer, wanted[node.name]) for node in graph.nodes}
    forms = {name: frozenset(found) for name, found in wanted.items()}
    return Assignment(integer, {name: tuple(found) for name, found in reads.items()}, produced, forms)


def _integer_nodes(graph: Graph, precision: dict[str, str]) -> frozenset[str]:
    integer: set[str] = set()
    for node in graph.nodes:
        if node.is_layer:
            chosen = PRECISIONS[precision[node.name]].is_integer
        else:
            chosen = node.op not in ("input", "foreign") and _has_integer_kernel(node) and set(node.inputs) <= integer
        if chosen:
            integer.add(node.name)
    return frozenset(integer)


def _has_integer_kernel(node: Node) -> bool:
    """Averages over windows of differing sizes have no single multiplier."""
    return not (node.op == "avg_pool2d" and any(node.pool.padding) and not node.pool.count_include_pad)


def _reads(node: Node, integer: frozenset[str]) -> tuple[str, ...]:
    """Form of every input; '' for a residual, which takes either."""
    if node.op == "foreign":
        return (FIRST,) * len(node.inputs)
    form = UINT8_FORM if node.name in integer else FLOAT
    if node.residual:
        return (form,) * (len(node.inputs) - 1) + ("",)
    return (form,) * len(node.inputs)


def _produced(node: Node, integer: bool, wanted: set[str]) -> str:
    if node.op == "foreign":
        return FIRST
    if node.op in CONVERTING:
        # Both wanted: an integer operation writes uint8, so that all readers see the same numbers; a float one
        # writes float32, which nothing is lost from.
        if UINT8_FORM in wanted and (integer or wanted == {UINT8_FORM}):
            return UINT8_FORM
        return FLOAT
    return UINT8_FORM if integer else FLOAT
