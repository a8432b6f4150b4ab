"""The arguments of a layer's kernel, declared in the order in which every kernel of a layer takes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cpu.epilogue import Arguments, declare_arguments
from qsearch.kernels.cpu.vectors import load
from qsearch.qtype import PRECISIONS
from qsearch.quantize.program import OpKey

__all__ = ["LayerBuffers", "channel_constants", "clipped_per_channel", "declare_layer"]


@dataclass(frozen=True)
class LayerBuffers:
    """The arguments of a convolution or linear layer, flat.

    Attributes:
        source: Input.
        residual: Second input, if the layer adds one.
        weight: Packed weights.
        bias: int32 or float32, one per packed output channel.
        multiplier: float32, one per packed output channel; None for float layers.
        clip_high: float32, one per packed output channel, if the layer clips per channel.
        arguments: The scalars.
        output: Output.
    """

    source: tirx.Buffer
    residual: tirx.Buffer | None
    weight: tirx.Buffer
    bias: tirx.Buffer
    multiplier: tirx.Buffer | None
    clip_high: tirx.Buffer | None
    arguments: Arguments
    output: tirx.Buffer


def declare_layer(key: OpKey, weights: int, channels: int, align: int = 64) -> LayerBuffers:
    """Declare the arguments.

    Args:
        key: The operation.
        weights: Elements of the packed weight.
        channels: Elements of each of `channel_constants`.
        align: Bytes to which input and weight are aligned.
    """
    sizes = [int(np.prod(shape)) for shape in key.shapes]
    integer = key.precision != "fp32"
    source = T.arg("source", T.Buffer((sizes[0],), key.dtypes[0], align=align))
    residual = T.arg("residual", T.Buffer((sizes[1],), key.dtypes[1])) if key.residual else None
    weight = T.arg("weight", T.Buffer((weights,), PRECISIONS[key.precision or "fp32"].weight.dtype, align=align))
    bias = T.arg("bias", T.Buffer((channels,), "int32" if integer else "float32"))
    multiplier = T.arg("multiplier", T.Buffer((channels,), "float32")) if integer else None
    clip_high = T.arg("clip_high", T.Buffer((channels,), "float32")) if key.clips_channels else None
    arguments = declare_arguments()
    output = T.arg("output", T.Buffer((sizes[-1],), key.dtypes[-1]))
    return LayerBuffers(source, residual, weight, bias, multiplier, clip_high, arguments, output)


def channel_constants(key: OpKey) -> tuple[str, ...]:
    """Names of the constants that have a value for every output channel, in the order of the arguments."""
    names = ("bias",) if key.precision == "fp32" else ("bias", "multiplier")
    return (*names, "clip_high") if key.clips_channels else names


def clipped_per_channel(buffers: LayerBuffers, value: Expr, channel: Expr | int, lanes: int) -> Expr:
    """Clip a vector at its channels' own high ends, where the layer does.

    Args:
        buffers: The layer's arguments.
        value: float32 x lanes in the unit of the output.
        channel: First packed output channel.
        lanes: Number of lanes.
    """
    return value if buffers.clip_high is None else tirx.min(value, load(buffers.clip_high, channel, lanes))
