"""Converters of matrix products: matmul, two-operand einsum, scaled dot product attention.

Each becomes strided products of values where they lie: heads are neither split nor moved.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from qsearch.models.graph import Matmul, Node
from qsearch.models.graph_builder import Builder, FxNode, argument, place, shape_of
from qsearch.models.memory import held, see, tokens_shape, view_of
from qsearch.models.views import View, period, strides_of

__all__ = ["ATTENTION_CONVERTERS"]


def _product(builder: Builder, name: str, a: View, b: View) -> View:
    """Append a product and give the view of its result.

    A result whose columns lie side by side in b (attention's values) takes b's order of axes, so that joining
    the heads moves nothing; any other (attention's scores) is laid out plainly.

    Args:
        builder: The graph being imported.
        name: Name of the node.
        a: Index (batch..., m, k).
        b: Index (batch..., k, n).
    """
    batch = np.broadcast_shapes(a.index.shape[:-2], b.index.shape[:-2])
    (m, k), n = a.index.shape[-2:], b.index.shape[-1]
    a_name, a_strides = _strided(builder, a.moved(np.broadcast_to(a.index, (*batch, m, k))), (-1,))
    b_name, b_strides = _strided(builder, b.moved(np.broadcast_to(b.index, (*batch, k, n))), (-1, -2))
    shape = (*batch, m, n)
    axes = list(range(len(shape)))
    if b_strides[-1] == 1:
        # Rows of the result stand where rows of b stand: axes by falling stride, the columns last.
        axes = sorted(axes[:-1], key=lambda axis: -b_strides[1 + axis]) + axes[-1:]
    index = np.arange(math.prod(shape)).reshape([shape[axis] for axis in axes]).transpose(np.argsort(axes))
    strides = strides_of(index)
    assert strides is not None
    matmul = Matmul((*batch, m, n, k), a_strides, b_strides, strides, a.factor * b.factor)
    made = builder.append(Node(name, "matmul", (a_name, b_name), tokens_shape(builder, shape), matmul=matmul))
    return View(made, index)


def _strided(builder: Builder, view: View, adjacent: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """An operand's node and strides; it is gathered where it has none, or where none of the axes `adjacent` is dense."""
    strides = strides_of(view.index)
    if strides is not None and any(strides[axis] == 1 or view.index.shape[axis] == 1 for axis in adjacent):
        return view.node, strides
    shape = view.index.shape
    name = held(builder, view.node, view.index.ravel(), tokens_shape(builder, shape))
    plain = strides_of(np.arange(math.prod(shape)).reshape(shape))
    assert plain is not None
    return name, plain


def _operands(builder: Builder, *nodes: FxNode) -> list[View] | None:
    """Views of values of two axes or more that depend on the image, or None."""
    if any(not isinstance(node, torch.fx.Node) or builder.tensor(node) is not None or len(shape_of(node)) < 2 for node in nodes):
        return None
    return [view_of(builder, node) for node in nodes]


def _matmul(builder: Builder, node: FxNode) -> bool:
    views = _operands(builder, *node.args[:2])
    return views is not None and see(builder, node, _product(builder, f"{place(node)}.matmul", *views))


def _einsum(builder: Builder, node: FxNode) -> bool:
    """Batch axes in both operands and the result; one axis summed over; one axis of each operand's own."""
    equation = node.args[0].replace(" ", "")
    views = _operands(builder, *node.args[1]) if len(node.args[1]) == 2 and "->" in equation and "." not in equation else None
    if views is None:
        return False
    given, out = equation.split("->")
    a, b = given.split(",")
    batch = [axis for axis in out if axis in a and axis in b]
    own, other = ([axis for axis in out if axis in first and axis not in second] for first, second in ((a, b), (b, a)))
    summed = [axis for axis in a if axis in b and axis not in out]
    if (len(own), len(other), len(summed)) != (1, 1, 1) or any(len({*text}) < len(text) for text in (a, b, out)):
        return False
    if len(a) != len(batch) + 2 or len(b) != len(batch) + 2:
        return False

    def arranged(view: View, text: str, order: list[str]) -> View:
        return view.moved(view.index.transpose([text.index(axis) for axis in order]))

    left, right = arranged(views[0], a, batch + own + summed), arranged(views[1], b, batch + summed + other)
    result = _product(builder, f"{place(node)}.matmul", left, right)
    return see(builder, node, arranged(result, "".join(batch + own + other), list(out)))


def _attention(builder: Builder, node: FxNode) -> bool:
    """softmax(q @ k^T * scale + mask) @ v."""
    views = _operands(builder, *node.args[:3])
    mask = argument(node, 3, "attn_mask", None)
    mask_tensor = builder.tensor(mask) if isinstance(mask, torch.fx.Node) else None
    unusual = argument(node, 4, "dropout_p", 0.0) or node.kwargs.get("enable_gqa", False)
    if views is None or unusual or (mask is not None and mask_tensor is None):
        return False
    q, k, v = views
    scale = node.kwargs.get("scale")
    scale = q.index.shape[-1] ** -0.5 if scale is None else float(scale)
    where = place(node)
    q = View(q.node, q.index, q.factor * scale)
    scores = _product(builder, f"{where}.scores", q, k.moved(np.swapaxes(k.index, -1, -2)))
    if argument(node, 5, "is_causal", False):
        mask_tensor = torch.ones(scores.index.shape[-2:], dtype=torch.bool).tril()
    if mask_tensor is not None:
        scores = _masked(builder, f"{where}.mask", scores, mask_tensor)
    shape = builder.shape(scores.node)
    weights = builder.append(Node(f"{where}.softmax", "softmax", (scores.node,), shape))
    return see(builder, node, _product(builder, f"{where}.values", View(weights, scores.index), v))


def _masked(builder: Builder, name: str, scores: View, mask: torch.Tensor) -> View:
    """Add a mask, whose False is minus infinity; scores are laid out plainly."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    values = mask.float().expand(scores.index.shape).numpy().ravel()
    return View(builder.append(Node(name, "shift", (scores.node,), builder.shape(scores.node)), period(values)), scores.index)


ATTENTION_CONVERTERS: dict[str, Callable[[Builder, FxNode], bool]] = {
    "aten.matmul.default": _matmul,
    "aten.bmm.default": _matmul,
    "aten.mm.default": _matmul,
    "aten.einsum.default": _einsum,
    "aten.scaled_dot_product_attention.default": _attention,
}
