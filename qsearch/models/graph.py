"""The layer graph: what qsearch knows of a model, immutable, in topological order.

Shapes are logical: (N, C, H, W) for images, (N, F) for features, as in torch. Four axes always mean an image, and
its memory is channels-last: (N, H, W, C). A value of any other rank lies in memory as its shape says; what torch
sees as four or more axes that are no image (windows, heads) is held as tokens (N, tokens, C), see
`qsearch.models.views`. Parameters travel beside the graph in `Parameters`, keyed by node name, so that the graph itself is
small, comparable and hashable by content.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

__all__ = ["ACTIVATIONS", "MOVES", "Conv", "ForeignOp", "Graph", "Matmul", "Model", "Node", "Parameters", "Pool"]

# Pointwise functions with a lowering of their own; the first three only clip.
ACTIVATIONS = ("relu", "relu6", "clip", "hardswish", "hardsigmoid", "sigmoid", "silu", "gelu", "tanh")
# Operations that only move bytes: whatever form their input has, their value can have too.
MOVES = ("view", "gather")


@dataclass(frozen=True)
class Conv:
    """Geometry of a convolution; linear layers use kernel (1, 1).

    Attributes:
        kernel: (kh, kw).
        stride: (sh, sw).
        padding: (top, left, bottom, right), zeros.
        dilation: (dh, dw).
        groups: Number of groups; equal to the input channels for depthwise.
    """

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(frozen=True)
class Pool:
    """Geometry of a pooling window.

    Attributes:
        kernel: (kh, kw).
        stride: (sh, sw).
        padding: (top, left, bottom, right).
        count_include_pad: Average pooling counts padded zeros as values.
    """

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    count_include_pad: bool = True


@dataclass(frozen=True)
class Matmul:
    """A batch of products a (m, k) @ b (k, n), each operand and the result strided over its value's memory.

    Attributes:
        extents: (batch axes..., m, n, k).
        a: (offset, strides of the batch axes..., stride of m, stride of k) in elements.
        b: (offset, strides of the batch axes..., stride of k, stride of n).
        out: (offset, strides of the batch axes..., stride of m, stride of n).
        factor: The products are multiplied by it.
    """

    extents: tuple[int, ...] = ()
    a: tuple[int, ...] = ()
    b: tuple[int, ...] = ()
    out: tuple[int, ...] = ()
    factor: float = 1.0


@dataclass(frozen=True)
class ForeignOp:
    """An operator without a lowering of its own; it runs in float through TVM's legalisation.

    Attributes:
        target: Name of the ATen overload, for example 'aten.layer_norm.default'.
        call: JSON text {"args": [...], "kwargs": {...}, "output": i}, where {"tensor": i} stands for the i-th
            input of the node, {"parameter": name} for a constant, {"dtype": name} for a dtype; "output" selects
            an element where the operator returns a tuple.
    """

    target: str
    call: str

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the constants it reads, sorted."""
        found: set[str] = set()

        def visit(value: Any) -> None:
            if isinstance(value, dict):
                if "parameter" in value:
                    found.add(value["parameter"])
                for item in value.values():
                    visit(item)
            elif isinstance(value, list):
                for item in value:
                    visit(item)

        visit(json.loads(self.call))
        return tuple(sorted(found))


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        name: Unique; the user's own module name for layers ('features.3.conv.0'), else 'parent.op'.
        op: 'input', 'conv2d', 'linear', 'add', 'mul', 'concat', 'max_pool2d', 'avg_pool2d', 'activation',
            'flatten', 'foreign', 'view' (the same memory with another shape), 'gather' (out[i] = x[index[i]] over
            memory, in runs; index -1 gives zero), 'matmul', 'softmax' over the last axis, 'layer_norm' over the last
            axis, 'l2_normalize' (rows of the last axis divided by max(length, epsilon)), 'scale' (x * c) or
            'shift' (x + c), where c repeats over memory.
        inputs: Names of the nodes whose values it reads.
        shape: Logical shape of its value.
        conv: Geometry; means something for conv2d and linear only.
        pool: Geometry; means something for pooling only.
        activation: Function name, for activation; for conv2d, linear and add a fused clip applied last.
        clip: (low, high) of a fused or plain clip; None where unbounded on both sides.
        residual: For conv2d and linear: the last entry of `inputs` is added before the fused clip.
        channels: For concat: the channels it takes of the concatenation of its inputs, in order; None for all of
            them. Slices, splits and shuffles of channels are concats of this kind.
        foreign: What to call, for foreign.
        matmul: Extents and strides, for matmul.
        constants: Names within `Parameters.constants` of what else it reads: gather (index), scale and shift (c),
            layer_norm (weight, bias), softmax (optionally a shift of its input).
        epsilon: For layer_norm and l2_normalize.
        clip_high: For conv2d and linear: name within `Parameters.constants` of the high end of the fused clip in every
            output channel, float32 (O,); None where `clip` holds for all. `clip` then bounds the tensor as a whole: its
            high end is the largest of these.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    conv: Conv = Conv()
    pool: Pool = Pool()
    activation: str | None = None
    clip: tuple[float, float] | None = None
    residual: bool = False
    channels: tuple[int, ...] | None = None
    foreign: ForeignOp | None = None
    matmul: Matmul = Matmul()
    constants: tuple[str, ...] = ()
    epsilon: float = 0.0
    clip_high: str | None = None

    @property
    def is_layer(self) -> bool:
        """True for nodes whose precision is a choice."""
        return self.op in ("conv2d", "linear")

    @property
    def is_depthwise(self) -> bool:
        """True for convolutions with one input channel per group."""
        return self.op == "conv2d" and self.conv.groups > 1 and self.conv.groups == self.shape[1]


@dataclass(frozen=True)
class Parameters:
    """Weights beside the graph.

    Attributes:
        weight: Layer name -> float32 (O, I/groups, kh, kw); linear layers have kh = kw = 1.
        bias: Layer name -> float32 (O,), zeros where the model has none.
        norm: Layer name -> (mean, std), float32 (O,) each: the batch-norm statistics the layer's output had in
            training, where one was folded in; data-free ranges are derived from them.
        constants: Name -> array, for foreign operators and for `Node.constants`.
    """

    weight: dict[str, np.ndarray] = field(default_factory=dict)
    bias: dict[str, np.ndarray] = field(default_factory=dict)
    norm: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """Nodes in topological order; the first is the single input, `output` names the result."""

    nodes: tuple[Node, ...]
    output: str

    @cached_property
    def by_name(self) -> dict[str, Node]:
        """Node name -> node."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def consumers(self) -> dict[str, tuple[Node, ...]]:
        """Node name -> the nodes that read its value, in order."""
        readers: dict[str, list[Node]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                readers[name].append(node)
        return {name: tuple(nodes) for name, nodes in readers.items()}

    @property
    def input(self) -> Node:
        """The input node."""
        return self.nodes[0]

    @cached_property
    def layers(self) -> tuple[Node, ...]:
        """The quantizable nodes, in order."""
        return tuple(node for node in self.nodes if node.is_layer)

    @property
    def convolutions(self) -> tuple[str, ...]:
        """Names of the convolutions, in order."""
        return tuple(node.name for node in self.layers if node.op == "conv2d")

    @property
    def dense(self) -> tuple[str, ...]:
        """Names of the linear layers, in order."""
        return tuple(node.name for node in self.layers if node.op == "linear")

    @property
    def foreign(self) -> tuple[str, ...]:
        """Names of the nodes that run in float through TVM's own legalisation."""
        return tuple(node.name for node in self.nodes if node.op == "foreign")


@dataclass(frozen=True)
class Model:
    """A model ready for quantization: the graph and, beside it, its parameters."""

    name: str
    graph: Graph
    parameters: Parameters

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 over the graph and every parameter."""
        document = asdict(self.graph)
        for node in document["nodes"]:
            # Left out where unset: models without it keep the fingerprint that their statistics are filed under.
            if node["clip_high"] is None:
                del node["clip_high"]
        digest = hashlib.sha256(json.dumps(document, sort_keys=True, default=_plain).encode())
        for table in (self.parameters.weight, self.parameters.bias, self.parameters.constants):
            for name in sorted(table):
                digest.update(name.encode())
                digest.update(np.ascontiguousarray(table[name]).tobytes())
        return digest.hexdigest()


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else list(value)
