"""One converter per ATen operator that has a lowering of its own.

A converter returns False when the operator's arguments are outside what it covers; the node is then foreign.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from qsearch.models.convert_layers import convert_batch_norm, convert_conv2d, convert_linear
from qsearch.models.convert_viewed import convert_viewed, convert_viewed_element
from qsearch.models.graph import Node, Pool
from qsearch.models.graph_builder import Builder, FxNode, argument, foreign, pair, place, shape_of
from qsearch.models.memory import settle_inputs
from qsearch.models.select_channels import convert_channel_shuffle, convert_concat, convert_shuffled_view, convert_slice, select

__all__ = ["CONVERTERS", "convert", "convert_element"]

Converter = Callable[[Builder, FxNode], bool]
SPLITS = ("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default")


def convert(builder: Builder, node: FxNode) -> None:
    """Convert one operator: by its own converter, or as a foreign one."""
    if convert_shuffled_view(builder, node):
        return
    converter = CONVERTERS.get(str(node.target))
    # Converters of plain values come first where every operand is held as it is; then those that see through views.
    if converter is not None and not any(source in builder.views for source in node.all_input_nodes) and converter(builder, node):
        return
    if convert_viewed(builder, node, converter):
        return
    settle_inputs(builder, node)
    if converter is None or not converter(builder, node):
        foreign(builder, node)


def convert_element(builder: Builder, node: FxNode, source: FxNode, index: int) -> None:
    """Convert element `index` of an operator that returns a tuple; `node` is the getitem that wants it."""
    if builder.is_constant(source):
        if source not in builder.folded:
            builder.fold(source)
        builder.folded[node] = builder.folded[source][index]
        return
    if str(source.target) in SPLITS and _split_channels(builder, node, source, index):
        return
    if convert_viewed_element(builder, node, source, index):
        return
    settle_inputs(builder, source)
    converter = CONVERTERS.get(str(source.target)) if index == 0 else None
    builder.values.pop(source, None)
    if converter is None or not converter(builder, source):
        foreign(builder, source, index)
    builder.values[node] = builder.values.pop(source)


def _activation(function: str) -> Converter:
    def convert(builder: Builder, node: FxNode) -> bool:
        if function == "gelu" and argument(node, 1, "approximate", "none") != "none":
            return False
        return builder.add(
            node, Node(place(node), "activation", (builder.values[node.args[0]],), shape_of(node), activation=function)
        )

    return convert


def _clip(low: float | None, high: float | None) -> Converter:
    """A clip with fixed bounds, or with the operator's own where both are None (hardtanh, clamp)."""

    def convert(builder: Builder, node: FxNode) -> bool:
        bounds = [low, high]
        if low is None:
            defaults = (-1.0, 1.0) if "hardtanh" in str(node.target) else (None, None)
            names = ("min_val", "max_val") if "hardtanh" in str(node.target) else ("min", "max")
            bounds = [argument(node, i + 1, names[i], defaults[i]) for i in range(2)]
            bounds = [-math.inf if bounds[0] is None else bounds[0], math.inf if bounds[1] is None else bounds[1]]
        clip = (float(bounds[0]), float(bounds[1]))  # type: ignore[arg-type]
        if not clip[0] <= 0 <= clip[1]:
            return False
        source = builder.values[node.args[0]]
        return builder.add(node, Node(place(node), "activation", (source,), shape_of(node), activation="clip", clip=clip))

    return convert


def _binary(op: str) -> Converter:
    def convert(builder: Builder, node: FxNode) -> bool:
        if any(value not in builder.values for value in node.args[:2]) or node.kwargs.get("alpha", 1) != 1:
            return False
        a, b = node.args[:2]
        if op == "mul" and shape_of(a) != shape_of(node):
            a, b = b, a
        gate = len(shape_of(node)) == 4 and shape_of(b) == (*shape_of(node)[:2], 1, 1)
        if shape_of(a) != shape_of(node) or (shape_of(b) != shape_of(node) and not (op == "mul" and gate)):
            return False
        return builder.add(node, Node(place(node), op, (builder.values[a], builder.values[b]), shape_of(node)))

    return convert


def _split_channels(builder: Builder, node: FxNode, source: FxNode, index: int) -> bool:
    """Part `index` of a split of channels is a selection of them."""
    axis, parts = int(argument(source, 2, "dim", 0)), source.meta["val"]
    if axis % parts[0].dim() != 1:
        return False
    start = sum(int(part.shape[1]) for part in parts[:index])
    return select(builder, node, source.args[0], range(start, start + int(parts[index].shape[1])), source)


def _pool(builder: Builder, node: FxNode, op: str, pool: Pool) -> bool:
    """Accept a window only where it gives the operator's own output shape.

    With ceil_mode the last window may reach beyond the image: for a maximum that is more padding.
    """
    size = shape_of(node.args[0])[2:]
    value = node.meta["val"]
    out = tuple(int(x) for x in (value[0] if isinstance(value, (tuple, list)) else value).shape)
    before, after = pool.padding[:2], list(pool.padding[2:])
    for axis in range(2):
        reach = (out[2 + axis] - 1) * pool.stride[axis] + pool.kernel[axis] - size[axis] - before[axis]
        if op == "max_pool2d":
            after[axis] = max(after[axis], reach)
        if (size[axis] + before[axis] + after[axis] - pool.kernel[axis]) // pool.stride[axis] + 1 != out[2 + axis]:
            return False
    pool = replace(pool, padding=(before[0], before[1], after[0], after[1]))
    return builder.add(node, Node(place(node), op, (builder.values[node.args[0]],), out, pool=pool))


def _max_pool2d(builder: Builder, node: FxNode) -> bool:
    kernel = pair(node.args[1])
    if pair(argument(node, 4, "dilation", 1)) != (1, 1) or len(shape_of(node.args[0])) != 4:
        return False
    stride, padding = argument(node, 2, "stride", []) or kernel, pair(argument(node, 3, "padding", 0))
    return _pool(builder, node, "max_pool2d", Pool(kernel, pair(stride), padding * 2))


def _avg_pool2d(builder: Builder, node: FxNode) -> bool:
    if argument(node, 6, "divisor_override", None) is not None or len(shape_of(node.args[0])) != 4:
        return False
    kernel = pair(node.args[1])
    stride, padding = argument(node, 2, "stride", []) or kernel, pair(argument(node, 3, "padding", 0))
    count = bool(argument(node, 5, "count_include_pad", True))
    return _pool(builder, node, "avg_pool2d", Pool(kernel, pair(stride), padding * 2, count))


def _adaptive_avg_pool2d(builder: Builder, node: FxNode) -> bool:
    """Adaptive pooling whose windows are all alike is plain average pooling."""
    _, _, height, width = shape_of(node.args[0])
    out_height, out_width = shape_of(node)[2:]
    if height % out_height or width % out_width:
        return False
    window = (height // out_height, width // out_width)
    return _pool(builder, node, "avg_pool2d", Pool(window, window))


def _mean(builder: Builder, node: FxNode) -> bool:
    """The mean over height and width is the global average pool, followed by a flatten unless dimensions are kept."""
    shape = shape_of(node.args[0])
    axes = argument(node, 1, "dim", None)
    if len(shape) != 4 or axes is None or sorted(axis % 4 for axis in axes) != [2, 3]:
        return False
    source = builder.values[node.args[0]]
    builder.add(node, Node(place(node), "avg_pool2d", (source,), (*shape[:2], 1, 1), pool=Pool(shape[2:], shape[2:])))  # type: ignore[arg-type]
    if not argument(node, 2, "keepdim", False):
        builder.add(node, Node(place(node) + ".flatten", "flatten", (builder.values[node],), shape[:2]))
    return True


def _reshape(builder: Builder, node: FxNode) -> bool:
    """(N, C, H, W) -> (N, C * H * W) only."""
    before, after = shape_of(node.args[0]), shape_of(node)
    if before == after:
        return builder.alias(node, node.args[0])
    if len(before) != 4 or after != (before[0], math.prod(before[1:])):
        return False
    return builder.add(node, Node(place(node), "flatten", (builder.values[node.args[0]],), after))


def _identity(builder: Builder, node: FxNode) -> bool:
    return shape_of(node) == shape_of(node.args[0]) and builder.alias(node, node.args[0])


CONVERTERS: dict[str, Converter] = {
    "aten.conv2d.default": convert_conv2d,
    "aten.conv2d.padding": convert_conv2d,
    "aten.linear.default": convert_linear,
    "aten._native_batch_norm_legit_no_training.default": convert_batch_norm,
    "aten.relu.default": _clip(0.0, math.inf),
    "aten.relu6.default": _clip(0.0, 6.0),
    "aten.hardtanh.default": _clip(None, None),
    "aten.clamp.default": _clip(None, None),
    "aten.clamp_min.default": _clip(None, None),
    "aten.hardswish.default": _activation("hardswish"),
    "aten.hardsigmoid.default": _activation("hardsigmoid"),
    "aten.sigmoid.default": _activation("sigmoid"),
    "aten.silu.default": _activation("silu"),
    "aten.gelu.default": _activation("gelu"),
    "aten.tanh.default": _activation("tanh"),
    "aten.add.Tensor": _binary("add"),
    "aten.mul.Tensor": _binary("mul"),
    "aten.cat.default": convert_concat,
    "aten.slice.Tensor": convert_slice,
    "aten.channel_shuffle.default": convert_channel_shuffle,
    "aten.native_channel_shuffle.default": convert_channel_shuffle,
    "aten.max_pool2d.default": _max_pool2d,
    "aten.max_pool2d_with_indices.default": _max_pool2d,
    "aten.avg_pool2d.default": _avg_pool2d,
    "aten.adaptive_avg_pool2d.default": _adaptive_avg_pool2d,
    "aten.mean.dim": _mean,
    "aten.view.default": _reshape,
    "aten.reshape.default": _reshape,
    "aten._unsafe_view.default": _reshape,
    "aten.flatten.using_ints": _reshape,
    "aten.squeeze.dims": _reshape,
    "aten.squeeze.dim": _reshape,
    "aten.dropout.default": _identity,
    "aten.clone.default": _identity,
    "aten.alias.default": _identity,
    "aten.contiguous.default": _identity,
    "aten.detach.default": _identity,
}
