"""Decide, from the layers' precisions, which form every value of the graph is held in.

A value is produced once in the form that its readers want and converted only where readers disagree. An
operation that is not a layer runs in integers if everything it reads comes out of integer arithmetic: in 16
bits if any of it does, else in 8. If any of what it reads comes out of float16 or float8 arithmetic, and none out of
float32, it runs in float16: it reads that, and computes in float32. Three kinds of operations follow rules of their own:

- A matrix product (attention) runs in uint8 if every layer that feeds it has uint8 activations, whatever lies
  between (softmax, normalisations), so that its precision follows from the query, key and value layers'. Fed by
  some fp16 or fp8 layer and no fp32 one it runs in float16. Fed by int16 or fp32 layers, or over a contraction too long
  for int32, it runs in float32.
- Layer norm, softmax and their like compute in float32. They read uint8 or float16 where their neighbours do, else
  float32: 16-bit integers are converted before and after. They write float8, too.
- A value that is only moved in memory is moved in every form that is wanted of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from qsearch.models.graph import MOVES, Graph, Node
from qsearch.qtype import PRECISIONS

__all__ = [
    "FIRST",
    "FLOAT",
    "FLOAT8_FORM",
    "FLOAT16_FORM",
    "INT16_FORM",
    "INTEGER_FORMS",
    "ROUNDED_FORMS",
    "SHARED",
    "UINT8_FORM",
    "Assignment",
    "assign_forms",
    "kernel_precision",
]

# The forms of a value: uint8, int16, float8, float16 or float32 channels last, float32 channels first (foreign
# operators). All but the last are named after their dtypes.
UINT8_FORM, INT16_FORM, FLOAT16_FORM, FLOAT, FIRST = "uint8", "int16", "float16", "float32", "float32_first"
FLOAT8_FORM = "float8_e4m3fn"
# From the coarser to the finer.
INTEGER_FORMS = (UINT8_FORM, INT16_FORM)
# Those in which a value is not what float32 arithmetic makes it.
ROUNDED_FORMS = (*INTEGER_FORMS, FLOAT8_FORM, FLOAT16_FORM)
# Layers alone compute in float8; what lies between them computes in float16.
HALF_FORMS = frozenset((FLOAT8_FORM, FLOAT16_FORM))
# Operations that move integers unchanged: their values share scale and zero point with what they read.
SHARED = ("max_pool2d", "flatten")
# Operations whose kernel can write any form, whatever it computes in.
CONVERTING = ("conv2d", "linear", "add", "mul", "avg_pool2d", "input", "matmul")
# Operations that compute in float32, read uint8, float16 or float32, and write those or float8.
FLOAT_INSIDE = ("layer_norm", "softmax", "l2_normalize", "scale", "shift")
# Pixels of the largest averaging window: this many int16 fit an int32 sum.
MAX_WINDOW = 2**16
# Up to this length no sum on the way to a product of uint8 exceeds int32, whatever zero points are corrected for.
MAX_INTEGER_PRODUCT = 2**14


@dataclass(frozen=True)
class Assignment:
    """Forms of every node's value and of everything it reads.

    Attributes:
        computes: Node name -> form that it computes in: any but the last.
        reads: Node name -> form in which it reads each of its inputs; '' where it only moves it.
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
    _want(graph, wanted, graph.output, FLOAT)
    for node in graph.nodes:
        for name, form in zip(node.inputs, reads[node.name], strict=True):
            if form:
                _want(graph, wanted, name, form)
    for node in graph.nodes:
        for i, name in enumerate(node.inputs):
            if not reads[node.name][i] and node.op not in MOVES:
                moved = _moved_from(graph, name)
                reads[node.name][i] = _free_form(node, computes[node.name], computes[moved], wanted[moved])
                _want(graph, wanted, name, reads[node.name][i])
    produced = {node.name: _produced(node, computes[node.name], wanted[node.name]) for node in graph.nodes}
    forms = {name: frozenset(found) for name, found in wanted.items()}
    return Assignment(computes, {name: tuple(found) for name, found in reads.items()}, produced, forms)


def kernel_precision(precision: str, layer_type: str) -> str:
    """The precision that a layer's kernel computes in: depthwise layers do in fp32 what tf32 is asked of.

    Sums over one channel are no work for matrix units.
    """
    return "fp32" if precision == "tf32" and layer_type == "depthwise" else precision


def _moved_from(graph: Graph, name: str) -> str:
    """The node whose bytes a chain of moves carries."""
    while graph.by_name[name].op in MOVES:
        name = graph.by_name[name].inputs[0]
    return name


def _want(graph: Graph, wanted: dict[str, set[str]], name: str, form: str) -> None:
    """Want a form of a value; of what it is moved from too, so that every move finds it in that form."""
    wanted[name].add(form)
    while graph.by_name[name].op in MOVES:
        name, form = graph.by_name[name].inputs[0], FLOAT if form == FIRST else form
        wanted[name].add(form)


def _computing_forms(graph: Graph, precision: dict[str, str]) -> dict[str, str]:
    forms: dict[str, str] = {}
    # Node name -> the forms of the layers whose values reach it through no other layer.
    feeding: dict[str, set[str]] = {}
    for node in graph.nodes:
        given = {forms[name] for name in node.inputs}
        feeding[node.name] = set[str]().union(*(feeding[name] for name in node.inputs))
        if node.is_layer:
            forms[node.name] = PRECISIONS[precision[node.name]].activation.dtype
            feeding[node.name] = {forms[node.name]}
        elif node.op == "matmul":
            forms[node.name] = _product_form(node, feeding[node.name])
        elif node.op in ("input", "foreign") or FLOAT in given:
            forms[node.name] = FLOAT
        elif given & HALF_FORMS:
            forms[node.name] = FLOAT16_FORM
        elif node.op in FLOAT_INSIDE or not _has_integer_kernel(node):
            forms[node.name] = FLOAT
        else:
            forms[node.name] = INT16_FORM if INT16_FORM in given else UINT8_FORM
    _follow_readers(graph, forms)
    return forms


def _product_form(node: Node, feeding: set[str]) -> str:
    if feeding & HALF_FORMS and FLOAT not in feeding:
        return FLOAT16_FORM
    in_bytes = feeding == {UINT8_FORM} and node.matmul.extents[-1] <= MAX_INTEGER_PRODUCT
    return UINT8_FORM if in_bytes else FLOAT


def _follow_readers(graph: Graph, forms: dict[str, str]) -> None:
    """Let what only moves values take its readers' form, where its producer can write that form just as well."""
    for node in reversed(graph.nodes):
        if node.op not in SHARED or forms[node.name] == FLOAT or node.name == graph.output:
            continue
        producer = node
        while producer.op in SHARED and len(graph.consumers[producer.inputs[0]]) == 1:
            producer = graph.by_name[producer.inputs[0]]
        wanted = {forms[reader.name] for reader in graph.consumers[node.name]}
        # float8 is moved, but not compared.
        able = {*INTEGER_FORMS, FLOAT16_FORM} | ({FLOAT8_FORM} if node.op == "flatten" else set())
        if _converts(producer, forms[producer.name]) and len(wanted) == 1 and wanted <= able:
            forms[node.name] = wanted.pop()


def _has_integer_kernel(node: Node) -> bool:
    """Averages over windows of differing sizes have no single multiplier; vast ones overflow their sum."""
    if node.op != "avg_pool2d":
        return True
    whole = node.pool.count_include_pad or not any(node.pool.padding)
    return whole and node.pool.kernel[0] * node.pool.kernel[1] <= MAX_WINDOW


def _converts(node: Node, form: str) -> bool:
    """True if the node's kernel writes whatever form is wanted; a lookup table writes uint8 only."""
    return node.op in CONVERTING or (node.op == "activation" and form in (INT16_FORM, FLOAT16_FORM))


def _free_form(node: Node, form: str, producing: str, wanted: set[str]) -> str:
    """Form of an input that may come in several.

    A residual takes what exists, its layer's own form first, then integers. Where nothing exists yet, bytes are
    asked of a layer that computes in bytes, 16 bits by one that does in 16 bits, and float16 of one that computes in it or in
    float8: float32 would cost four times the memory, and a float layer's value is not rounded for a residual alone.

    Args:
        node: Who reads.
        form: What it computes in.
        producing: What the value is computed in.
        wanted: The forms that others want of it.
    """
    if node.op in FLOAT_INSIDE:
        if UINT8_FORM in wanted:
            return UINT8_FORM
        return FLOAT16_FORM if form == FLOAT16_FORM or FLOAT16_FORM in wanted else FLOAT
    for existing in (form, UINT8_FORM, INT16_FORM, FLOAT16_FORM, FLOAT8_FORM):
        if existing != FLOAT and existing in wanted:
            return existing
    if not wanted and (form in (INT16_FORM, FLOAT16_FORM) or form == producing == UINT8_FORM):
        return form
    return FLOAT16_FORM if not wanted and producing in HALF_FORMS else FLOAT


def _reads(node: Node, form: str) -> tuple[str, ...]:
    """Form of every input; '' for what takes the form that there is: residuals, float arithmetic on converted values, moves."""
    if node.op == "foreign":
        return (FIRST,) * len(node.inputs)
    if node.op in FLOAT_INSIDE or node.op in MOVES:
        return ("",) * len(node.inputs)
    if node.residual:
        return (form,) * (len(node.inputs) - 1) + ("",)
    return (form,) * len(node.inputs)


def _produced(node: Node, form: str, wanted: set[str]) -> str:
    if node.op == "foreign":
        return FIRST
    if form in HALF_FORMS and FLOAT16_FORM in wanted:
        return FLOAT16_FORM
    if node.op in FLOAT_INSIDE:
        return next(iter(wanted)) if len(wanted) == 1 and wanted <= {UINT8_FORM, *HALF_FORMS} else FLOAT
    if not _converts(node, form):
        return form
    # Several wanted: an integer operation writes the finest integers, so that all readers see the same numbers, and one
    # that computes in float16 writes that; a float one writes float32, which nothing is lost from.
    for integer in reversed(INTEGER_FORMS):
        if integer in wanted and (form in INTEGER_FORMS or wanted == {integer}):
            return integer
    return next(iter(wanted)) if len(wanted) == 1 and wanted <= HALF_FORMS else FLOAT
