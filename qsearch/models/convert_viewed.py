"""Converters that see through views: data movement, and operations that run on memory as it lies.

They come after the converters of plain values, and first where an operand is held in another order than torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from qsearch.models.convert_attention import ATTENTION_CONVERTERS
from qsearch.models.convert_layers import convert_linear_tokens
from qsearch.models.graph import Node
from qsearch.models.graph_builder import Builder, FxNode, argument, place, shape_of
from qsearch.models.memory import elements_of, held, scaled, see, tokens_of, view_of
from qsearch.models.views import View, period

__all__ = ["convert_viewed", "convert_viewed_element"]

Converter = Callable[[Builder, FxNode], bool]

# Operators that only move elements: applied to the places of the elements, they give the places of the result.
MOVEMENTS = tuple(
    f"aten.{name}"
    for name in (
        *("view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int", "permute.default"),
        *("transpose.int", "t.default", "movedim.int", "squeeze.dim", "squeeze.dims", "squeeze.default", "unsqueeze.default"),
        *("select.int", "slice.Tensor", "narrow.default", "expand.default", "roll.default", "flip.default", "repeat.default"),
        *("split.Tensor", "split_with_sizes.default", "chunk.default", "unbind.int", "index.Tensor", "index_select.default"),
    )
)
IDENTITIES = tuple(f"aten.{name}.default" for name in ("clone", "alias", "contiguous", "detach", "dropout"))
POINTWISE = tuple(
    f"aten.{name}.default"
    for name in ("relu", "relu6", "hardtanh", "clamp", "clamp_min", "hardswish", "hardsigmoid", "sigmoid", "silu", "gelu", "tanh")
)


def convert_viewed(builder: Builder, node: FxNode, plain: Converter | None) -> bool:
    """Convert an operator whose operands lie in any order.

    Args:
        builder: The graph being imported.
        node: The operator.
        plain: The operator's converter for plain values, where there is one.
    """
    target = str(node.target)
    if target in MOVEMENTS or target in IDENTITIES:
        return _move(builder, node)
    if target in POINTWISE and plain is not None:
        return _pointwise(builder, node, plain)
    if target in ("aten.add.Tensor", "aten.mul.Tensor") and plain is not None and _both_computed(builder, node):
        return _binary(builder, node, plain)
    converter = _CONVERTERS.get(target)
    return converter is not None and converter(builder, node)


def convert_viewed_element(builder: Builder, node: FxNode, source: FxNode, index: int) -> bool:
    """Convert element `index` of an operator that returns a list of parts; `node` is the getitem that wants it."""
    return str(source.target) in MOVEMENTS and _move(builder, source, node, index)


def _move(builder: Builder, node: FxNode, result: FxNode | None = None, element: int = 0) -> bool:
    source = node.args[0]
    if any(builder.tensor(other) is None for other in node.all_input_nodes if other is not source):
        return False
    view = view_of(builder, source)
    if str(node.target) in IDENTITIES:
        return see(builder, node, view)
    given = torch.from_numpy(np.ascontiguousarray(view.index))
    arguments, keywords = torch.fx.node.map_arg(
        (node.args[1:], node.kwargs), lambda other: given if other is source else builder.tensor(other)
    )
    moved = node.target(given, *arguments, **keywords)
    moved = moved if result is None else moved[element]
    return see(builder, result or node, view.moved(moved.numpy()))


def _pad(builder: Builder, node: FxNode) -> bool:
    """A padding by zeros."""
    value = argument(node, 3, "value", None) if "aten.pad" in str(node.target) else argument(node, 2, "value", 0)
    mode = argument(node, 2, "mode", "constant") if "aten.pad" in str(node.target) else "constant"
    if mode != "constant" or value:
        return False
    view = view_of(builder, node.args[0])
    padded = torch.nn.functional.pad(torch.from_numpy(np.ascontiguousarray(view.index)), list(node.args[1]), value=-1)
    return see(builder, node, view.moved(padded.numpy()))


def _concat(builder: Builder, node: FxNode) -> bool:
    """Parts of one node's memory, and constants: a view, and a shift where constants are not zero."""
    sources, axis = node.args[0], argument(node, 1, "dim", 0)
    views = [None if builder.tensor(source) is not None else view_of(builder, source) for source in sources]
    held = [view for view in views if view is not None]
    if len({(view.node, view.factor) for view in held}) != 1:
        return False
    shapes = [shape_of(source) for source in sources]
    parts = [np.full(shape, -1) if view is None else view.index for view, shape in zip(views, shapes, strict=True)]
    see(builder, node, held[0].moved(np.concatenate(parts, axis)))
    if len(held) == len(views):
        return True
    constants: list[torch.Tensor] = []
    for source, shape in zip(sources, shapes, strict=True):
        known = builder.tensor(source)
        constants.append(torch.zeros(shape) if known is None else known)
    return _with_constant(builder, node, node, "shift", torch.cat(constants, axis))


def _pointwise(builder: Builder, node: FxNode, plain: Converter) -> bool:
    """A function of single elements, on memory as it lies."""
    source = node.args[0]
    if builder.tensor(source) is not None:
        return False
    view = elements_of(builder, source)
    return _as_plain(builder, node, plain, {source: view.node}, view)


def _as_plain(builder: Builder, node: FxNode, plain: Converter, names: dict[FxNode, str], view: View) -> bool:
    """Call the converter of plain values on nodes that hold the operands in another order than torch's."""
    kept = {source: builder.values[source] for source in names if source in builder.values}
    builder.values.update(names)
    done = plain(builder, node)
    for source in names:
        del builder.values[source]
    builder.values.update(kept)
    if not done:
        return False
    builder.nodes[-1] = replace(builder.nodes[-1], shape=builder.shape(view.node))
    return see(builder, node, replace(view, node=builder.values.pop(node)))


def _both_computed(builder: Builder, node: FxNode) -> bool:
    a, b = node.args[:2]
    return all(isinstance(x, torch.fx.Node) and builder.tensor(x) is None for x in (a, b)) and shape_of(a) == shape_of(b)


def _binary(builder: Builder, node: FxNode, plain: Converter) -> bool:
    """Two values of equal shapes: the later one keeps its order, so that a residual fuses into its layer."""
    order = [known.name for known in builder.nodes]
    later, other = sorted(node.args[:2], key=lambda source: -order.index(view_of(builder, source).node))
    view = elements_of(builder, later)
    shape = builder.shape(view.node)
    # Which of torch's elements stands at each place of the later one's memory.
    wanted = np.empty(view.index.size, np.int64)
    wanted[view.index.ravel()] = np.arange(view.index.size)
    moved = view_of(builder, other)
    names = {later: view.node, other: held(builder, scaled(builder, moved), moved.index.ravel()[wanted], shape)}
    return _as_plain(builder, node, plain, names, view)


def _constant_operand(op: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Converter:
    """Addition of, or multiplication by, a constant."""

    def convert(builder: Builder, node: FxNode) -> bool:
        a, b = node.args[:2]
        if isinstance(a, torch.fx.Node) and builder.tensor(a) is not None and "aten.sub" not in str(node.target):
            a, b = b, a
        if not isinstance(a, torch.fx.Node) or builder.tensor(a) is not None or node.kwargs.get("alpha", 1) != 1:
            return False
        constant = builder.tensor(b) if isinstance(b, torch.fx.Node) else torch.tensor(float(b))
        if constant is None or shape_of(a) != shape_of(node) or not constant.is_floating_point():
            return False
        changed = change(constant.double())
        if op == "scale" and changed.numel() == 1:
            view = view_of(builder, a)
            return see(builder, node, replace(view, factor=view.factor * float(changed)))
        return _with_constant(builder, node, a, op, changed)

    return convert


def _with_constant(builder: Builder, node: FxNode, source: FxNode, op: str, constant: torch.Tensor) -> bool:
    """Append x * c or x + c, with the constant in the order of x's memory."""
    view = elements_of(builder, source)
    values = np.empty(view.index.size, np.float32)
    values[view.index.ravel()] = constant.expand(shape_of(source)).reshape(-1).float().numpy()
    shape = builder.shape(view.node)
    name = builder.append(Node(f"{place(node)}.{op}", op, (view.node,), shape), period(values))
    builder.values.pop(node, None)
    builder.views.pop(node, None)
    return see(builder, node, replace(view, node=name))


def _linear(builder: Builder, node: FxNode) -> bool:
    """On rows as they lie; in torch's order where heads are cut from the result, so that they can be strided."""
    return convert_linear_tokens(builder, node, _is_multiplied(node))


def _is_multiplied(node: FxNode) -> bool:
    """True if a matrix product reads a value, by way of data movement, scaling and normalising."""
    for user in node.users:
        target = str(user.target)
        if target in ATTENTION_CONVERTERS:
            return True
        between = (*MOVEMENTS, *IDENTITIES, "<built-in function getitem>", "aten.mul.Tensor", "aten.div.Tensor")
        if target in between and _is_multiplied(user):
            return True
    return False


def _layer_norm(builder: Builder, node: FxNode) -> bool:
    """Over the last axis."""
    shape = shape_of(node)
    if tuple(node.args[1]) != shape[-1:]:
        return False
    weight, bias = (builder.tensor(argument(node, i, name, None)) for i, name in ((2, "weight"), (3, "bias")))
    weight = torch.ones(shape[-1]) if weight is None else weight
    bias = torch.zeros(shape[-1]) if bias is None else bias
    arrays = [constant.float().numpy().copy() for constant in (weight, bias)]
    return _on_rows(
        builder, node, Node(place(node), "layer_norm", (), (), epsilon=float(argument(node, 4, "eps", 1e-5))), *arrays
    )


def _softmax(builder: Builder, node: FxNode) -> bool:
    """Over the last axis."""
    if node.args[1] not in (-1, len(shape_of(node)) - 1):
        return False
    return _on_rows(builder, node, Node(place(node), "softmax", (), ()))


def _on_rows(builder: Builder, node: FxNode, made: Node, *constants: np.ndarray) -> bool:
    tokens = tokens_of(builder, node.args[0])
    name = builder.append(replace(made, inputs=(tokens.node,), shape=builder.shape(tokens.node)), *constants)
    return see(builder, node, tokens.rows(name, shape_of(node)))


def _divide(builder: Builder, node: FxNode) -> bool:
    """By a constant, or by the length of the rows: x / max(norm(x), epsilon), as `normalize` of torch writes it."""
    if not isinstance(node.args[1], torch.fx.Node) or builder.tensor(node.args[1]) is not None:
        return _constant_operand("scale", torch.reciprocal)(builder, node)
    epsilon = _length_of(node.args[1], node.args[0])
    if epsilon is None:
        return False
    return _on_rows(builder, node, Node(f"{place(node)}.l2_normalize", "l2_normalize", (), (), epsilon=epsilon))


def _length_of(divisor: FxNode, x: FxNode) -> float | None:
    """Epsilon, if `divisor` is expand(clamp_min(vector_norm(x, 2, -1, keepdim), epsilon))."""
    expanded = divisor.args[0] if str(divisor.target) == "aten.expand.default" else divisor
    if str(expanded.target) != "aten.clamp_min.default" or str(expanded.args[0].target) != "aten.linalg_vector_norm.default":
        return None
    norm = expanded.args[0]
    usual = norm.args[0] is x and argument(norm, 1, "ord", 2) == 2 and argument(norm, 3, "keepdim", False)
    axes = argument(norm, 2, "dim", None)
    return float(expanded.args[1]) if usual and list(axes or ()) in ([-1], [len(shape_of(x)) - 1]) else None


_CONVERTERS: dict[str, Converter] = {
    "aten.pad.default": _pad,
    "aten.constant_pad_nd.default": _pad,
    "aten.cat.default": _concat,
    "aten.linear.default": _linear,
    "aten.add.Tensor": _constant_operand("shift", lambda c: c),
    "aten.sub.Tensor": _constant_operand("shift", torch.neg),
    "aten.mul.Tensor": _constant_operand("scale", lambda c: c),
    "aten.mul.Scalar": _constant_operand("scale", lambda c: c),
    "aten.div.Tensor": _divide,
    "aten.layer_norm.default": _layer_norm,
    "aten.softmax.int": _softmax,
    "aten._softmax.default": _softmax,
} | ATTENTION_CONVERTERS
