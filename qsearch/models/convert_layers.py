"""Converters of layers: convolution, linear, and the batch norm that folds into them."""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from qsearch.models.graph import Conv, Node
from qsearch.models.graph_builder import Builder, FxNode, argument, pair, place, shape_of
from qsearch.models.memory import see, tokens_of

__all__ = ["convert_batch_norm", "convert_conv2d", "convert_linear", "convert_linear_tokens"]


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


def convert_conv2d(builder: Builder, node: FxNode) -> bool:
    """Two-dimensional convolution, with a zero padding before it if there is one."""
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


def convert_linear(builder: Builder, node: FxNode) -> bool:
    """Features are the last axis; four axes mean an image here, whose last axis is none of features."""
    return len(shape_of(node.args[0])) != 4 and _layer(builder, node, "linear", Conv())


def convert_linear_tokens(builder: Builder, node: FxNode, ordered: bool = False) -> bool:
    """A linear layer over the rows of its input's memory, in whatever order they lie or in torch's."""
    if builder.tensor(node.args[1]) is None or builder.tensor(node.args[0]) is not None:
        return False
    tokens = tokens_of(builder, node.args[0], ordered)
    builder.values[node.args[0]], kept = tokens.node, builder.values.get(node.args[0])
    features = shape_of(node)[-1]
    _layer(builder, node, "linear", Conv(), (*builder.shape(tokens.node)[:-1], features))
    if kept is None:
        del builder.values[node.args[0]]
    else:
        builder.values[node.args[0]] = kept
    see(builder, node, tokens.rows(builder.values.pop(node), shape_of(node)))
    return True


def convert_batch_norm(builder: Builder, node: FxNode) -> bool:
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
