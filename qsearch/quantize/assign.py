"""Decide, from the layers' precisions, which form every value of the graph is held in.

A value is produced once in the form that its readers want and converted only where readers disagree. An
operation that is not a layer runs in integers if everything it reads comes out of integer arithmetic: in 16
bits if any of it does, else in 8.
"""

from __future__ import annotations

from dataclasses import dataclass

from qsearch.models.graph import Graph, Node
from qsearch.qtype import PRECISIONS

__all__ = ["FIRST", "FLOAT", "INT16_FORM", "INTEGER_FORMS", "SHARED", "Assignment", "UINT8_FORM", "assign_forms"]

# The forms of a value: uint8 or int16 channels last, float32 channels last, float32 channels first (foreign
# operators). The first three are named after their dtypes.
UINT8_FORM, INT16_FORM, FLOAT, FIRST = "uint8", "int16", "float32", "float32_first"
# From the coarser to the finer.
INTEGER_FORMS = (UINT8_FORM, INT16_FORM)
# Operations that move integers unchanged: their values share scale and zero point with what they read.
SHARED = ("max_pool2d", "flatten")
# Operations whose kernel can write any form, whatever it computes in.
CONVERTING = ("conv2d", "linear", "add", "mul", "avg_pool2d", "input")
# Pixels of the largest averaging window: this many int16 fit an int32 sum.
MAX_WINDOW = 2**16


@dataclass(frozen=True)
class Assignment:
    """Forms of every node's value and of everything it reads.

    Attributes:
        computes: Node name -> form that it computes in: 'uint8', 'int16' or 'float32'.
        reads: Node name -> form in which it reads each of its inputs.
        produced: Node name -> form in which its own operation writes its value.
        wanted: Node name -> forms that must exist.
    """

    computes: dict[str, str]
    reads: dict[str, tuple[str, ...]]
    produced: dict[str, str]
    wanted: dict[str, frozenset[str]]


def assign_forms(graph: Graph, precision: dict[str, str]) -> Assignment:
    """Assign forms.

    Args:
        graph: The layer graph.
        precision: Layer name -> precision name, for every layer.
    """
    computes = _computing_forms(graph, precision)
    reads = {node.name: list(_reads(node, computes[node.name])) for node in graph.nodes}
    wanted: dict[str, set[str]] = {node.name: set() for node in graph.nodes}
    wanted[graph.output].add(FLOAT)
    for node in graph.nodes:
        for name, form in zip(node.inputs, reads[node.name], strict=True):
            if form:
                wanted[name].add(form)
    for node in graph.nodes:
        for i, name in enumerate(node.inputs):
            if not reads[node.name][i]:
                reads[node.name][i] = _residual_form(computes[node.name], wanted[name])
                wanted[name].add(reads[node.name][i])
    produced = {node.name: _produced(node, computes[node.name], wanted[node.name]) for node in graph.nodes}
    forms = {name: frozenset(found) for name, found in wanted.items()}
    return Assignment(computes, {name: tuple(found) for name, found in reads.items()}, produced, forms)


def _computing_forms(graph: Graph, precision: dict[str, str]) -> dict[str, str]:
    forms: dict[str, str] = {}
    for node in graph.nodes:
        given = {forms[name] for name in node.inputs}
        if node.is_layer:
            forms[node.name] = PRECISIONS[precision[node.name]].activation.dtype
        elif node.op in ("input", "foreign") or FLOAT in given or not _has_integer_kernel(node):
            forms[node.name] = FLOAT
        else:
            forms[node.name] = INT16_FORM if INT16_FORM in given else UINT8_FORM
    _follow_readers(graph, forms)
    return forms


def _follow_readers(graph: Graph, forms: dict[str, str]) -> None:
    """Let what only moves integers take its readers' form, where its producer can write that form just as well."""
    for node in reversed(graph.nodes):
        if node.op not in SHARED or forms[node.name] == FLOAT or node.name == graph.output:
            continue
        producer = node
        while producer.op in SHARED and len(graph.consumers[producer.inputs[0]]) == 1:
            producer = graph.by_name[producer.inputs[0]]
        wanted = {forms[reader.name] for reader in graph.consumers[node.name]}
        if _converts(producer, forms[producer.name]) and len(wanted) == 1 and wanted <= set(INTEGER_FORMS):
            forms[node.name] = wanted.pop()


def _has_integer_kernel(node: Node) -> bool:
    """Averages over windows of differing sizes have no single multiplier; vast ones overflow their sum."""
    if node.op != "avg_pool2d":
        return True
    whole = node.pool.count_include_pad or not any(node.pool.padding)
    return whole and node.pool.kernel[0] * node.pool.kernel[1] <= MAX_WINDOW


def _converts(node: Node, form: str) -> bool:
    """True if the node's kernel writes whatever form is wanted; a lookup table writes uint8 only."""
    return node.op in CONVERTING or (node.op == "activation" and form == INT16_FORM)


def _residual_form(form: str, wanted: set[str]) -> str:
    """A residual takes what exists, its layer's own form first, then the smallest; an int16 layer asks for no more."""
    for existing in (form, UINT8_FORM, INT16_FORM):
        if existing != FLOAT and existing in wanted:
            return existing
    return INT16_FORM if form == INT16_FORM and not wanted else FLOAT


def _reads(node: Node, form: str) -> tuple[str, ...]:
    """Form of every input; '' for a residual, which takes any."""
    if node.op == "foreign":
        return (FIRST,) * len(node.inputs)
    if node.residual:
        return (form,) * (len(node.inputs) - 1) + ("",)
    return (form,) * len(node.inputs)


def _produced(node: Node, form: str, wanted: set[str]) -> str:
    if node.op == "foreign":
        return FIRST
    if not _converts(node, form):
        return form
    # Several wanted: an integer operation writes the finest integers, so that all readers see the same numbers; a
    # float one writes float32, which nothing is lost from.
    for integer in reversed(INTEGER_FORMS):
        if integer in wanted and (form != FLOAT or wanted == {integer}):
            return integer
    return FLOAT
