"""What layers that compute channel by channel have in common: their arguments, and what becomes of their sums."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cuda.epilogue import FLOAT_DTYPES, Arguments, declare_arguments, dequantized, finished, held
from qsearch.kernels.cuda.simt import add, converted, load, mul, registers, store
from qsearch.kernels.cuda.vectors import fetched, put
from qsearch.quantize.program import INTEGER_DTYPES, OpKey

__all__ = ["LayerBuffers", "LayerEnd", "declare_layer", "pack_layer", "starts_at_bias", "sums_integers"]


def sums_integers(key: OpKey) -> bool:
    """True if products are summed in int32, False for float32."""
    return key.dtypes[0] in INTEGER_DTYPES


def sums_scaled(key: OpKey) -> bool:
    """True if sums have a multiplier per output channel."""
    return key.dtypes[0] not in FLOAT_DTYPES


def starts_at_bias(key: OpKey) -> bool:
    """True if a sum begins with its bias; that of float8 is added once the sum is in the unit of the output."""
    return sums_integers(key) or not sums_scaled(key)


def _channel_constants(key: OpKey) -> tuple[str, ...]:
    """Names of the constants that have a value for every output channel, in the order of the arguments."""
    names = ("bias", "multiplier") if sums_scaled(key) else ("bias",)
    return (*names, "clip_high") if key.clips_channels else names


def pack_layer(key: OpKey, constants: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Constants other than the weight, as `declare_layer` takes them."""
    return (*(constants[name] for name in _channel_constants(key)), constants["integers"], constants["floats"])


@dataclass(frozen=True)
class LayerBuffers:
    """The kernel's arguments.

    Attributes:
        source: Input.
        residual: Second input, if the layer adds one.
        weight: Packed weights.
        channel: By name, what every output channel has.
        arguments: The scalars.
        output: Output.
    """

    source: tirx.Buffer
    residual: tirx.Buffer | None
    weight: tirx.Buffer
    channel: dict[str, tirx.Buffer]
    arguments: Arguments
    output: tirx.Buffer


def declare_layer(key: OpKey, weights: int, dtype: str) -> LayerBuffers:
    """Declare the arguments.

    Args:
        key: The operation.
        weights: Elements of the packed weight.
        dtype: Their dtype.
    """
    sizes, channels = [int(np.prod(shape)) for shape in key.shapes], key.shapes[-1][-1]
    source = T.arg("source", T.Buffer((sizes[0],), key.dtypes[0]))
    residual = T.arg("residual", T.Buffer((sizes[1],), key.dtypes[1])) if key.residual else None
    weight = T.arg("weight", T.Buffer((weights,), dtype))
    bias = "int32" if sums_integers(key) else "float32"
    channel = {
        name: T.arg(name, T.Buffer((channels,), bias if name == "bias" else "float32")) for name in _channel_constants(key)
    }
    arguments = declare_arguments()
    return LayerBuffers(source, residual, weight, channel, arguments, T.arg("output", T.Buffer((sizes[-1],), key.dtypes[-1])))


class LayerEnd:
    """Turns the sums of adjacent output channels into outputs.

    Args:
        key: The operation.
        buffers: Its arguments.
        channel: First channel.
        lanes: Channels, a power of two that divides the first.
    """

    def __init__(self, key: OpKey, buffers: LayerBuffers, channel: Expr, lanes: int) -> None:
        self._key, self._buffers, self._lanes, self._arguments = key, buffers, lanes, held(buffers.arguments)
        names = [name for name in buffers.channel if name != "bias" or not starts_at_bias(key)]
        self._tables = {name: fetched(buffers.channel[name], channel, lanes) for name in names}

    def write(self, totals: tirx.Buffer, first: int, at: Expr) -> None:
        """Finish and store all channels of one position.

        Args:
            totals: Sums, int32 or float32.
            first: Where in them the first channel's is.
            at: Index of the first channel's output.
        """
        key, buffers = self._key, self._buffers
        made = registers(self._lanes, key.dtypes[-1])
        residual = None if buffers.residual is None else fetched(buffers.residual, at, self._lanes)
        for lane in range(self._lanes):
            value = load(totals, first + lane)
            if "multiplier" in self._tables:
                value = mul(converted(value, "float32"), load(self._tables["multiplier"], lane))
            if "bias" in self._tables:
                value = add(value, load(self._tables["bias"], lane))
            if residual is not None:
                value = add(value, dequantized(load(residual, lane), key.dtypes[1], self._arguments, "b"))
            if "multiplier" not in self._tables and key.dtypes[-1] not in FLOAT_DTYPES:
                value = mul(value, self._arguments.float("multiplier"))
            if key.clips_channels:
                value = tirx.min(value, load(self._tables["clip_high"], lane))
            store(made, lane, finished(key.dtypes[-1], value, self._arguments, key.clipped))
        put(buffers.output, at, made, self._lanes)
