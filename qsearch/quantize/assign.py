"""Decide, from the layers' precisions, which form every value of the graph is held in.

A value is produced once in the form that its readers want and converted only where readers disagree. An
operation that is not a layer runs in integers if everything it reads comes out of integer arithmetic. Two exceptions:
a matrix product (attention) runs in uint8 if every layer that feeds it does, whatever lies between (softmax,
normalisations), so that its precision follows from the query, key and value layers'; and layer norm, softmax and
their like always compute in float32, yet read and write whichever form their neighbours want. A value that is only
moved in memory is moved in every form that is wanted of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from qsearch.models.graph import MOVES, Graph, Node
from qsearch.qtype import PRECISIONS, UINT8

__all__ = ["FIRST", "FLOAT", "Assignment", "UINT8_FORM", "assign_forms"]

# The forms of a value: uint8 channels last, float32 channels last, float32 channels first (foreign operators).
UINT8_FORM, FLOAT, FIRST = "uint8", "float32", "float32_first"
# Operations whose kernel can turn float32 into uint8, or uint8 into float32, while storing.
CONVERTING = ("conv2d", "linear", "add", "mul", "avg_pool2d", "input", "matmul")
# Operations that compute in float32, whatever the form of what they read and write.
FLOAT_INSIDE = ("layer_norm", "softmax", "l2_normalize", "scale", "shift")
# Up to this length no sum on the way to a product of uint8 exceeds int32, whatever zero points are corrected for.
MAX_INTEGER_PRODUCT = 2**14


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
    _move_wishes(graph, wanted)
    # A residual takes whatever exists; uint8 before float32, as it is the smaller.
    for node in graph.nodes:
        for i, name in enumerate(node.inputs):
            if not reads[node.name][i] and node.op not in MOVES:
                reads[node.name][i] = UINT8_FORM if UINT8_FORM in wanted[moved_from(graph, name)] else FLOAT
                wanted[name].add(reads[node.name][i])
    _move_wishes(graph, wanted)
    produced = {node.name: _produced(node, node.name in integer, wanted[node.name]) for node in graph.nodes}
    forms = {name: frozenset(found) for name, found in wanted.items()}
    return Assignment(integer, {name: tuple(found) for name, found in reads.items()}, produced, forms)


def moved_from(graph: Graph, name: str) -> str:
    """The node whose bytes a chain of moves carries."""
    while graph.by_name[name].op in MOVES:
        name = graph.by_name[name].inputs[0]
    return name


def _move_wishes(graph: Graph, wanted: dict[str, set[str]]) -> None:
    """What is wanted of a moved value is wanted of its source, so that the move finds it in that form."""
    for node in reversed(graph.nodes):
        if node.op in MOVES:
            wanted[node.inputs[0]] |= {FLOAT if form == FIRST else form for form in wanted[node.name]}


def _integer_nodes(graph: Graph, precision: dict[str, str]) -> frozenset[str]:
    integer: set[str] = set()
    fed: dict[str, bool] = {}
    for node in graph.nodes:
        fed[node.name] = all(fed[name] for name in node.inputs)
        if node.is_layer:
            chosen = PRECISIONS[precision[node.name]].is_integer
            fed[node.name] = PRECISIONS[precision[node.name]].activation == UINT8
        elif node.op == "matmul":
            chosen = fed[node.name] and node.matmul.extents[-1] <= MAX_INTEGER_PRODUCT
        else:
            chosen = node.op not in ("input", "foreign") and _has_integer_kernel(node) and set(node.inputs) <= integer
        if chosen:
            integer.add(node.name)
    return frozenset(integer)


def _has_integer_kernel(node: Node) -> bool:
    """Averages over windows of differing sizes have no single multiplier; some operations always compute in float."""
    return node.op not in FLOAT_INSIDE and not (
        node.op == "avg_pool2d" and any(node.pool.padding) and not node.pool.count_include_pad
    )


def _reads(node: Node, integer: frozenset[str]) -> tuple[str, ...]:
    """Form of every input; '' for a residual, or float arithmetic on converted values, which take either."""
    if node.op == "foreign":
        return (FIRST,) * len(node.inputs)
    if node.op in FLOAT_INSIDE or node.op in MOVES:
        return ("",) * len(node.inputs)
    form = UINT8_FORM if node.name in integer else FLOAT
    if node.residual:
        return (form,) * (len(node.inputs) - 1) + ("",)
    return (form,) * len(node.inputs)


def _produced(node: Node, integer: bool, wanted: set[str]) -> str:
    if node.op == "foreign":
        return FIRST
    if node.op in (*CONVERTING, *FLOAT_INSIDE):
        # Both wanted: an integer operation writes uint8, so that all readers see the same numbers; a float one
        # writes float32, which nothing is lost from.
        if UINT8_FORM in wanted and (integer or wanted == {UINT8_FORM}):
            return UINT8_FORM
        return FLOAT
    return UINT8_FORM if integer else FLOAT
