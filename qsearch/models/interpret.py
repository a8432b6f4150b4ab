"""Run the layer graph in float with torch, one value at a time.

This is the float model as qsearch understands it: what calibration observes, what sensitivity compares with,
and what an import is checked against. Values are channels-last in memory, which torch convolves fastest on
CPUs; logical shapes stay (N, C, H, W).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qsearch.errors import UnsupportedModelError
from qsearch.models.graph import ForeignOp, Graph, Model, Node, Parameters, Pool
from qsearch.models.interpret_memory import MEMORY_OPERATIONS, images_run

__all__ = ["call_foreign", "forward", "interpret", "one_thread"]

_POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch run on one thread; also a decorator.

    Its threads wait for each other by spinning, at every operation: beside one other busy process the small operations
    of a network take fifty times as long on two threads as on one. On idle processors little is lost.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def interpret(model: Model, images: Tensor, on_value: Callable[[Node, Tensor], None] | None = None) -> Tensor:
    """Run the model in float.

    A value is freed after its last consumer, so that peak memory is that of the widest cut through the graph.

    Args:
        model: The model; the batch of its graph need not be that of `images`.
        images: float32 (N, C, H, W), preprocessed. Where an operation holds the graph's batch (attention, windows, foreign
            ones), they are run with the first of them once more as often as makes the batch divide them, see `images_run`.
        on_value: Called with every node, in order, and its value, the input included, for all images that are run.

    Returns:
        The value of the graph's output, float32.

    Raises:
        UnsupportedModelError: A node's operation or a foreign operator is unknown.
    """
    return forward(model, images, on_value=on_value)


def forward(
    model: Model,
    images: Tensor,
    *,
    known: Mapping[str, Tensor] = MappingProxyType({}),
    read: Callable[[Node, int, Tensor], Tensor] | None = None,
    weight: Mapping[str, Tensor] | None = None,
    bias: Mapping[str, Tensor] | None = None,
    on_value: Callable[[Node, Tensor], None] | None = None,
) -> Tensor:
    """Run the model in float, parts of it replaced, recording gradients where torch does.

    Args:
        model: The model.
        images: As for `interpret`.
        known: Node name -> its value, which is then not computed; what only such nodes read need not be there.
        read: Called with a node, the position of one of its inputs and that input's value; gives what the node reads.
        weight: Layer name -> float32 (O, I/groups, kh, kw) in place of the model's own.
        bias: Layer name -> float32 (O,) in place of the model's own.
        on_value: As for `interpret`.

    Returns:
        The value of the graph's output for the images given, float32.

    Raises:
        UnsupportedModelError: A node's operation or a foreign operator is unknown.
    """
    graph, given = model.graph, len(images)
    if images_run(graph, given) != given:
        images = images[torch.arange(images_run(graph, given)) % given]
    # The interpreter takes arrays and tensors alike; what is given as a tensor keeps its gradient.
    own = model.parameters
    weights = cast(dict[str, np.ndarray], {**own.weight, **(weight or {})})
    parameters = replace(own, weight=weights, bias=cast(dict[str, np.ndarray], {**own.bias, **(bias or {})}))
    last_use = {name: node.name for node in graph.nodes for name in node.inputs}
    values: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.name in known:
            value = known[node.name]
        else:
            inputs = [values[name] if read is None else read(node, i, values[name]) for i, name in enumerate(node.inputs)]
            value = _computed(node, inputs, graph, parameters, images)
        if on_value is not None:
            on_value(node, value)
        values[node.name] = value
        for name in {*node.inputs, node.name} & values.keys():
            if last_use.get(name, node.name) == node.name and name != graph.output:
                del values[name]
    output = values[graph.output]
    return output if len(images) == given else output[: given * len(output) // len(images)]


def _computed(node: Node, inputs: list[Tensor], graph: Graph, parameters: Parameters, images: Tensor) -> Tensor:
    if node.op == "input":
        return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images
    if node.op == "foreign":
        return _foreign(node, inputs, graph, parameters, len(images))
    if node.op in MEMORY_OPERATIONS:
        return MEMORY_OPERATIONS[node.op](node, inputs, parameters, len(images) // graph.input.shape[0])
    return _value(node, inputs, parameters)


def _value(node: Node, inputs: list[Tensor], parameters: Parameters) -> Tensor:
    try:
        compute = _OPERATIONS[node.op]
    except KeyError:
        known = ", ".join(["input", *_OPERATIONS, "foreign"])
        raise UnsupportedModelError(f"node {node.name!r} has the unknown operation {node.op!r}; known are {known}") from None
    value = compute(node, inputs, parameters)
    if node.residual:
        value = value + inputs[-1]
    # An activation applies its own clip; everywhere else a clip is fused and comes last.
    value = value if node.op == "activation" else _clipped(value, node.clip, node.residual or node.op in ("conv2d", "linear"))
    return value if node.clip_high is None else torch.minimum(value, _clip_high(node, parameters))


def _clip_high(node: Node, parameters: Parameters) -> Tensor:
    """The high end of a clip per output channel, shaped to fit the node's value."""
    high = _tensor(parameters.constants[node.clip_high or ""])
    return high.view(-1, 1, 1) if node.op == "conv2d" else high


def _clipped(value: Tensor, clip: tuple[float, float] | None, fresh: bool) -> Tensor:
    """A value within bounds; in its own memory if nobody else has it."""
    if clip is None:
        return value
    # The same values as of clamp; its gradient takes one pass over memory instead of four.
    return F.hardtanh(value, *clip, inplace=fresh)


def _tensor(array: np.ndarray | Tensor) -> Tensor:
    if isinstance(array, Tensor):
        return array
    # torch warns about arrays it could write to by accident, such as memory-mapped weights.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _conv2d(node: Node, inputs: list[Tensor], parameters: Parameters) -> Tensor:
    conv = node.conv
    x, padding = _padded(inputs[0], conv.padding, 0.0)
    weight, bias = _tensor(parameters.weight[node.name]), _tensor(parameters.bias[node.name])
    return F.conv2d(x, weight, bias, conv.stride, padding, conv.dilation, conv.groups)


def _linear(node: Node, inputs: list[Tensor], parameters: Parameters) -> Tensor:
    weight = _tensor(parameters.weight[node.name]).flatten(1)
    return F.linear(inputs[0], weight, _tensor(parameters.bias[node.name]))


def _padded(x: Tensor, padding: tuple[int, int, int, int], fill: float) -> tuple[Tensor, tuple[int, int]]:
    """Pad explicitly where torch's symmetric argument cannot say it; returns what is left for that argument."""
    top, left, bottom, right = padding
    if (top, left) == (bottom, right):
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom), value=fill), (0, 0)


def _max_pool2d(node: Node, inputs: list[Tensor], parameters: Parameters) -> Tensor:
    pool = node.pool
    x, padding = _padded(inputs[0], pool.padding, -torch.inf)
    return F.max_pool2d(x, pool.kernel, pool.stride, padding)


def _avg_pool2d(node: Node, inputs: list[Tensor], parameters: Parameters) -> Tensor:
    pool = node.pool
    x, padding = _padded(inputs[0], pool.padding, 0.0)
    if x is inputs[0] or pool.count_include_pad:
        return F.avg_pool2d(x, pool.kernel, pool.stride, padding, count_include_pad=pool.count_include_pad)
    return F.avg_pool2d(x, pool.kernel, pool.stride) / _share_inside(inputs[0], pool)


def _share_inside(x: Tensor, pool: Pool) -> Tensor:
    """The share of every window that lies on the image, float32 (1, 1, H_out, W_out)."""
    inside, _ = _padded(torch.ones(1, 1, *x.shape[2:]), pool.padding, 0.0)
    return F.avg_pool2d(inside, pool.kernel, pool.stride)


def _concat(node: Node, inputs: list[Tensor], parameters: Parameters) -> Tensor:
    joined = torch.cat(inputs, dim=1)
    return joined if node.channels is None else joined[:, list(node.channels)]


def _activation(node: Node, inputs: list[Tensor], parameters: Parameters) -> Tensor:
    if node.activation in _POINTWISE:
        return _POINTWISE[node.activation](inputs[0])
    if node.activation == "clip":
        return _clipped(inputs[0], node.clip, fresh=False)
    known = ", ".join(["clip", *_POINTWISE])
    raise UnsupportedModelError(f"node {node.name!r} has the unknown activation {node.activation!r}; known are {known}")


_OPERATIONS: dict[str, Callable[[Node, list[Tensor], Parameters], Tensor]] = {
    "conv2d": _conv2d,
    "linear": _linear,
    "add": lambda node, inputs, parameters: inputs[0] + inputs[1],
    "mul": lambda node, inputs, parameters: inputs[0] * inputs[1],
    "concat": _concat,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
    "activation": _activation,
    "flatten": lambda node, inputs, parameters: inputs[0].flatten(1),
}


def _foreign(node: Node, inputs: list[Tensor], graph: Graph, parameters: Parameters, batch: int) -> Tensor:
    """Call an ATen operator, once per batch of the graph's own size.

    Its arguments may hold the batch the model was exported with (a view's shape), and its input may hold the
    batch within a larger axis 0 (windows of an image). Splitting and joining along axis 0 undo each other,
    so this stays right across any chain of such operators.
    """
    assert node.foreign is not None
    constants = {name: _tensor(parameters.constants[name]) for name in node.foreign.parameters}
    parts = max(1, batch // graph.input.shape[0])
    split = []
    for name, value in zip(node.inputs, inputs, strict=True):
        length = graph.by_name[name].shape[0] if value.dim() else 0
        # Views need logical order; a value without a batch (made from parameters alone) is passed whole.
        whole = value.dim() == 0 or value.shape[0] != length * parts
        split.append([value] * parts if whole else [part.contiguous() for part in value.split(length)])
    results = []
    for part in range(parts):
        operands = [values[part] for values in split]
        results.append(call_foreign(node.foreign, operands, constants))
    return results[0] if parts == 1 or results[0].dim() == 0 or not inputs else torch.cat(results)


def call_foreign(foreign: ForeignOp, operands: list[Tensor], parameters: dict[str, Tensor]) -> Tensor:
    """Make one ATen call.

    Args:
        foreign: The operator and its arguments.
        operands: Values of the node's inputs, logical shapes.
        parameters: The constants it names.

    Raises:
        UnsupportedModelError: This version of torch does not have the operator.
    """
    call = json.loads(foreign.call)
    args = [_bound(item, operands, parameters) for item in call["args"]]
    kwargs = {key: _bound(item, operands, parameters) for key, item in call["kwargs"].items()}
    result = _overload(foreign.target)(*args, **kwargs)
    return result[call.get("output", 0)] if isinstance(result, (tuple, list)) else result


def _overload(target: str) -> Callable[..., Any]:
    found: Any = torch.ops
    try:
        for part in target.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise UnsupportedModelError(f"the model calls {target!r}, which this version of torch does not have") from None
    return found


def _bound(spec: Any, operands: list[Tensor], parameters: dict[str, Tensor]) -> Any:
    """Put tensors, parameters and dtypes in the places that the call's JSON form holds for them."""
    if isinstance(spec, list):
        return [_bound(item, operands, parameters) for item in spec]
    if not isinstance(spec, dict):
        return spec
    if spec.keys() == {"tensor"}:
        return operands[spec["tensor"]]
    if spec.keys() == {"parameter"}:
        return parameters[spec["parameter"]]
    if spec.keys() == {"dtype"}:
        return getattr(torch, spec["dtype"])
    raise UnsupportedModelError(f"the call of a foreign operator holds {spec}, expected a tensor, a parameter or a dtype")
