"""One converter per ATen operator that has a lowering of its own; `foreign` for the rest.

A converter returns False when the operator's arguments are outside what it covers; the node is then foreign.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from qsearch.models.graph import Conv, ForeignOp, Node, Parameters, Pool

__all__ = ["CONVERTERS", "Builder", "foreign"]

# fx types the arguments of a node as a union of everything; what a converter finds there it checks itself.
FxNode = Any
Converter = Callable[["Builder", FxNode], bool]


@dataclass
class Builder:
    """The layer graph while it is being imported.

    Attributes:
        constants: Placeholder name -> (parameter name, tensor).
        nodes: Nodes so far.
        values: fx node -> name of the node that holds its value.
        folded: fx node -> tensor, for values that do not depend on the image.
        parameters: Weights so far.
    """

    constants: dict[str, tuple[str, torch.Tensor]]
    nodes: list[Node] = field(default_factory=list)
    values: dict[fx.Node, str] = field(default_factory=dict)
    folded: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    parameters: Parameters = field(default_factory=Parameters)

    def tensor(self, node: Any) -> torch.Tensor | None:
        """The tensor of a parameter or folded constant, None for values that depend on the image."""
        if not isinstance(node, fx.Node):
            return None
        return self.constants[node.name][1] if node.name in self.constants else self.folded.get(node)

    def is_constant(self, node: FxNode) -> bool:
        """True if no argument depends on the image."""
        return all(self.tensor(source) is not None for source in node.all_input_nodes)

    def fold(self, node: FxNode) -> None:
        """Compute a constant now."""
        arguments, keywords = fx.node.map_arg((node.args, node.kwargs), self.tensor)
        self.folded[node] = node.target(*arguments, **keywords)

    def add(self, fx_node: FxNode, node: Node) -> bool:
        """Append a node under a unique name and let `fx_node` stand for it."""
        taken = {known.name for known in self.nodes}
        name, count = node.name, 1
        while name in taken:
            count += 1
            name = f"{node.name}#{count}"
        self.nodes.append(replace(node, name=name))
        self.values[fx_node] = name
        return True

    def alias(self, fx_node: FxNode, source: FxNode) -> bool:
        """Let `fx_node` stand for the value of `source`."""
        self.values[fx_node] = self.values[source]
        return True

    def select(self, node: FxNode, source: FxNode, index: int) -> None:
        """Convert element `index` of an operator that returns a tuple."""
        if self.is_constant(source):
            if source not in self.folded:
                self.fold(source)
            self.folded[node] = self.folded[source][index]
            return
        if str(source.target) in SPLITS:
            _slice(self, node, source, index)
            return
        converter = CONVERTERS.get(str(source.target)) if index == 0 else None
        self.values.pop(source, None)
        if converter is not None and converter(self, source):
            self.values[node] = self.values.pop(source)
        else:
            foreign(self, source, index)
            self.values[node] = self.values.pop(source)


def place(node: FxNode) -> str:
    """The user's module path of an operator, or 'path.operator' where the module holds several."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = stack[-1] if stack else ("", "")
    leaf = isinstance(kind, str) and kind.startswith("torch.nn.modules.") and "container" not in kind
    operator = str(node.target).split(".")[1] if "." in str(node.target) else node.name
    return path if path and leaf else f"{path}.{operator}".lstrip(".")


def shape_of(node: FxNode) -> tuple[int, ...]:
    """Logical shape of an fx node's value."""
    return tuple(int(extent) for extent in node.meta["val"].shape)


def foreign(builder: Builder, node: FxNode, index: int = 0) -> bool:
    """Keep an operator as it is: it will run in float through TVM's own legalisation."""
    inputs: list[str] = []

    def encode(value: Any) -> Any:
        if isinstance(value, fx.Node):
            constant = builder.tensor(value)
            if constant is None:
                inputs.append(builder.values[value])
                return {"tensor": len(inputs) - 1}
            name = builder.constants[value.name][0] if value.name in builder.constants else value.name
            builder.parameters.constants[name] = constant.numpy()
            return {"parameter": name}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, (list, tuple)):
            return [encode(item) for item in value]
        return value if isinstance(value, (bool, int, float, str, type(None))) else None

    call = {"args": encode(node.args), "kwargs": {key: encode(value) for key, value in node.kwargs.items()}, "output": index}
    value = node.meta["val"]
    shape = tuple(int(extent) for extent in (value[index] if isinstance(value, (tuple, list)) else value).shape)
    operator = ForeignOp(str(node.target), json.dumps(call, sort_keys=True))
    return builder.add(node, Node(place(node), "foreign", tuple(inputs), shape, foreign=operator))


def _slice(builder: Builder, node: FxNode, source: FxNode, index: int) -> None:
    """One part of a split is a slice: an operator with a single result."""
    axis = int(argument(source, 2, "dim", 0))
    lengths = [int(part.shape[axis]) for part in source.meta["val"]]
    start = sum(lengths[:index])
    call = {"args": [{"tensor": 0}, axis, start, start + lengths[index]], "kwargs": {}, "output": 0}
    operator = ForeignOp("aten.slice.Tensor", json.dumps(call, sort_keys=True))
    builder.add(node, Node(place(source), "foreign", (builder.values[source.args[0]],), shape_of(node), foreign=operator))


def argument(node: FxNode, position: int, name: str, default: Any) -> Any:
    """An argument by position or keyword."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def pair(value: Any) -> tuple[int, int]:
    """A one- or two-element list as a pair."""
    values = [value] if isinstance(value, int) else list(value)
    return (int(values[0]), int(values[-1]))


def layer_name(builder: Builder, weight: FxNode) -> str:
    """The user's module name: the weight's own name without its last part."""
    name = builder.constants[weight.name][0] if weight.name in builder.constants else weight.name
    return name.rpartition(".")[0] or name


def _layer(
    builder: Builder, node: FxNode, op: str, geometry: Conv, shape: tuple[int, ...] | None = None, source: FxNode | None = None
) -> bool:
    """Append a layer that reads `source` (its first argument by default) and has `shape` (its own by default)."""
    weight, read = builder.tensor(node.args[1]), source or node.args[0]
    if weight is None or read not in builder.values:
        return False
    bias = builder.tensor(argument(node, 2, "bias", None))
    weight = weight.float()
    weight = weight.reshape(*weight.shape, 1, 1) if op == "linear" else weight
    name = layer_name(builder, node.args[1])
    builder.add(node, Node(name, op, (builder.values[read],), shape or shape_of(node), conv=geometry))
    name = builder.values[node]
    builder.parameters.weight[name] = np.ascontiguousarray(weight.numpy())
    builder.parameters.bias[name] = np.zeros(weight.shape[0], np.float32) if bias is None else bias.float().numpy().copy()
    return True


def _conv2d(builder: Builder, node: FxNode) -> bool:
    kernel = shape_of(node.args[1])[2:]
    dilation = pair(argument(node, 5, "dilation", 1))
    padding = argument(node, 4, "padding", 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        own = (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)
    else:
        own = pair(0 if padding == "valid" else padding) * 2
    stride, groups = pair(argument(node, 3, "stride", 1)), int(argument(node, 6, "groups", 1))
    source, before = _without_padding(node.args[0])
    sides = (own[0] + before[0], own[1] + before[1], own[2] + before[2], own[3] + before[3])
    geometry = Conv((kernel[0], kernel[1]), stride, sides, dilation, groups)
    return _layer(builder, node, "conv2d", geometry, source=source)


def _without_padding(node: FxNode) -> tuple[fx.Node, tuple[int, int, int, int]]:
    """See through a zero padding of height and width: the convolution does it itself, also where it is uneven."""
    if str(node.target) not in ("aten.pad.default", "aten.constant_pad_nd.default") or len(node.args[1]) > 4:
        return node, (0, 0, 0, 0)
    mode, value = "constant", argument(node, 2, "value", 0)
    if str(node.target) == "aten.pad.default":
        mode, value = argument(node, 2, "mode", "constant"), argument(node, 3, "value", None)
    left, right, top, bottom = (*node.args[1], 0, 0)[:4]
    if mode != "constant" or value or min(left, right, top, bottom) < 0:
        return node, (0, 0, 0, 0)
    return node.args[0], (top, left, bottom, right)


def _linear(builder: Builder, node: FxNode) -> bool:
    """Features are the last axis; four axes are seen as three, because four axes mean an image here."""
    before, after = shape_of(node.args[0]), shape_of(node)
    if len(before) != 4:
        return _layer(builder, node, "linear", Conv())
    source = builder.values.get(node.args[0])
    if source is None:
        return False
    _view(builder, node, source, (before[0], before[1] * before[2], before[3]))
    builder.values[node.args[0]], kept = builder.values[node], source
    done = _layer(builder, node, "linear", Conv(), (after[0], after[1] * after[2], after[3]))
    builder.values[node.args[0]] = kept
    return done and _view(builder, node, builder.values[node], after)


def _view(builder: Builder, node: FxNode, source: str, shape: tuple[int, ...]) -> bool:
    """A foreign reshape of a value."""
    call = {"args": [{"tensor": 0}, list(shape)], "kwargs": {}, "output": 0}
    operator = ForeignOp("aten.view.default", json.dumps(call, sort_keys=True))
    return builder.add(node, Node(f"{place(node)}.view", "foreign", (source,), shape, foreign=operator))


def _batch_norm(builder: Builder, node: FxNode) -> bool:
    """Fold into the convolution before, or become a 1x1 depthwise convolution where there is none to fold into."""
    source = node.args[0]
    gamma, beta, mean, variance = (_float64(builder.tensor(value)) for value in node.args[1:5])
    if mean is None or variance is None or len(shape_of(source)) != 4:
        return False
    gamma = np.ones_like(mean) if gamma is None else gamma
    beta = np.zeros_like(mean) if beta is None else beta
    factor = gamma / np.sqrt(variance + float(node.args[6]))
    previous = next((known for known in builder.nodes if known.name == builder.values[source]), None)
    if previous is None or previous.op != "conv2d" or _read_elsewhere(builder, previous.name):
        channels = shape_of(source)[1]
        name = place(node)
        builder.add(node, Node(name, "conv2d", (builder.values[source],), shape_of(source), conv=Conv(groups=channels)))
        name = builder.values[node]
        builder.parameters.weight[name] = np.ones((channels, 1, 1, 1), np.float32)
        builder.parameters.bias[name] = np.zeros(channels, np.float32)
    else:
        name = previous.name
        builder.alias(node, source)
    weights, biases = builder.parameters.weight, builder.parameters.bias
    weights[name] = (weights[name] * factor[:, None, None, None]).astype(np.float32)
    biases[name] = ((biases[name] - mean) * factor + beta).astype(np.float32)
    builder.parameters.norm[name] = (beta.astype(np.float32), np.abs(gamma).astype(np.float32))
    return True


def _float64(value: torch.Tensor | None) -> np.ndarray | None:
    return None if value is None else value.double().numpy()


def _read_elsewhere(builder: Builder, name: str) -> bool:
    """True if any of the fx nodes that stand for a value has several readers."""
    return any(len(node.users) > 1 for node, known in builder.values.items() if known == name)


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


def _concat(builder: Builder, node: FxNode) -> bool:
    sources, axis = node.args[0], argument(node, 1, "dim", 0)
    rank = len(shape_of(node))
    if rank not in (2, 4) or axis % rank != 1 or any(source not in builder.values for source in sources):
        return False
    return builder.add(node, Node(place(node), "concat", tuple(builder.values[s] for s in sources), shape_of(node)))


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


SPLITS = ("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default")

CONVERTERS: dict[str, Converter] = {
    "aten.conv2d.default": _conv2d,
    "aten.conv2d.padding": _conv2d,
    "aten.linear.default": _linear,
    "aten._native_batch_norm_legit_no_training.default": _batch_norm,
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
    "aten.cat.default": _concat,
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
