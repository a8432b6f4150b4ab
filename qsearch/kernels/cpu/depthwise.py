"""Depthwise convolution: lanes are channels, a tile is a run of output columns of one row.

Every input vector of a kernel row is loaded once and used by all the output columns it reaches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cpu.epilogue import declare_arguments, dequantized, finish
from qsearch.kernels.cpu.isa import Isa
from qsearch.kernels.cpu.padding import padded_copy, padded_image
from qsearch.kernels.cpu.vectors import cast, for_blocks, kernel, load, rounded_product, splat
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["depthwise"]

MAX_TILE_COLUMNS = 8


def depthwise(key: OpKey, isa: Isa) -> Kernel | None:
    """Describe the kernel of a depthwise convolution, or None for another operation.

    Args:
        key: kind 'conv2d' with groups = input channels = output channels; shapes as for conv2d.
        isa: Instruction set.
    """
    if key.kind != "conv2d" or key.precision not in ("fp32", "int8"):
        return None
    channels = key.shapes[0][3]
    if key.conv.groups != channels or key.shapes[-1][3] != channels or channels == 1:
        return None
    columns = _tile_columns(key.shapes[-1][2], isa)
    workspace = 0
    if any(key.conv.padding):
        workspace = padded_image(key.shapes[0][1:], key.conv.padding, key.dtypes[0]).bytes
    variant = (isa.name, columns)
    return Kernel(key, variant, lambda s: _generate(key, isa, columns, s), lambda c: _pack(key, c), workspace, _pack_weight)


def _tile_columns(width: int, isa: Isa) -> int:
    """The widest tile that leaves the smallest remainder: fewest tiles first, then the least imbalance."""
    most = min(MAX_TILE_COLUMNS, width, isa.registers // 2 - 2)
    return min(range(1, most + 1), key=lambda n: (-(-width // n), n))


def _pack(key: OpKey, constants: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    names = ("bias", "multiplier") if key.precision == "int8" else ("bias",)
    return (*(constants[name] for name in names), constants["integers"], constants["floats"])


def _pack_weight(weight: np.ndarray) -> np.ndarray:
    """(C, kh, kw, 1) -> flat (kh, kw, C)."""
    return np.ascontiguousarray(weight[..., 0].transpose(1, 2, 0)).ravel()


def _generate(key: OpKey, isa: Isa, columns: int, symbol: str) -> tirx.PrimFunc:
    return kernel(symbol, lambda: _Depthwise(key, isa, columns).emit())


@dataclass
class _Depthwise:
    """The statements of one depthwise kernel."""

    key: OpKey
    isa: Isa
    columns: int

    def __post_init__(self) -> None:
        key = self.key
        self.integer = key.precision == "int8"
        self.kind = "int32" if self.integer else "float32"
        self.images, self.height, self.width, self.channels = key.shapes[0]
        _, self.out_height, self.out_width, _ = key.shapes[-1]
        self.row = self.width * self.channels
        if any(key.conv.padding):
            self.row = padded_image(key.shapes[0][1:], key.conv.padding, key.dtypes[0]).row

    def emit(self) -> None:
        """Declare the arguments and walk the images."""
        key, channels = self.key, self.channels
        size, out_size = int(np.prod(key.shapes[0][1:])), int(np.prod(key.shapes[-1][1:]))
        weight_kind = "int8" if self.integer else "float32"
        source = T.arg("source", T.Buffer((self.images * size,), key.dtypes[0]))
        self.residual = T.arg("residual", T.Buffer((self.images * out_size,), key.dtypes[1])) if key.residual else None
        self.weight = T.arg("weight", T.Buffer((int(np.prod(key.conv.kernel)) * channels,), weight_kind))
        self.bias = T.arg("bias", T.Buffer((channels,), self.kind))
        self.multiplier = T.arg("multiplier", T.Buffer((channels,), "float32")) if self.integer else None
        self.arguments = declare_arguments()
        self.output = T.arg("output", T.Buffer((self.images * out_size,), key.dtypes[-1]))
        if self.images == 1:
            self._image(source, 0, 0)
        else:
            with T.serial(0, self.images) as n:
                self._image(source, n * size, n * out_size)

    def _image(self, source: tirx.Buffer, base: Expr | int, out_base: Expr | int) -> None:
        if any(self.key.conv.padding):
            fill = tirx.const(0.0, "float32")
            if self.integer:
                fill = tirx.Cast("uint8", self.arguments.integer("a_zero_point"))
            source = padded_copy(source, base, self.key.shapes[0][1:], self.key.conv.padding, fill)
            base = 0
        whole, rest = divmod(self.out_width, self.columns)
        stride = self.key.conv.stride[1] * self.channels

        def row(y: Expr, channel: Expr | int, lanes: int) -> None:
            start = base + y * (self.key.conv.stride[0] * self.row) + channel
            out = out_base + y * (self.out_width * self.channels) + channel
            with T.serial(0, whole) as i:
                x = i * self.columns
                self._tile(source, start + x * stride, out + x * self.channels, channel, lanes, self.columns)
            if rest:
                x = whole * self.columns
                self._tile(source, start + x * stride, out + x * self.channels, channel, lanes, rest)

        with T.serial(0, self.out_height) as y:
            for_blocks(self.channels, self.isa.lanes, lambda channel, lanes: row(y, channel, lanes))

    def _tile(self, source: tirx.Buffer, start: Expr, out: Expr, channel: Expr | int, lanes: int, columns: int) -> None:
        conv = self.key.conv
        kind = f"{self.kind}x{lanes}" if lanes > 1 else self.kind
        accumulators = T.alloc_buffer((columns,), kind, scope="local", layout=None)
        for j in range(columns):
            T.buffer_store(accumulators, load(self.bias, channel, lanes), [j])

        def kernel_row(kh: Expr | int) -> None:
            at = start + kh * (conv.dilation[0] * self.row)
            self._row_taps(source, at, kh * conv.kernel[1] * self.channels + channel, accumulators, lanes)

        if conv.kernel[0] <= 5:
            for kh in range(conv.kernel[0]):
                kernel_row(kh)
        else:
            with T.serial(0, conv.kernel[0]) as kh:
                kernel_row(kh)
        for j in range(columns):
            self._finish(tirx.BufferLoad(accumulators, [j]), out + j * self.channels, channel, lanes)

    def _row_taps(self, source: tirx.Buffer, at: Expr, weight: Expr | int, accumulators: tirx.Buffer, lanes: int) -> None:
        """Add one kernel row: each input column once, for every output column it reaches."""
        conv, columns = self.key.conv, int(accumulators.shape[0])
        taps: dict[int, list[tuple[int, int]]] = {}
        for j in range(columns):
            for kw in range(conv.kernel[1]):
                taps.setdefault(j * conv.stride[1] + kw * conv.dilation[1], []).append((j, kw))
        weights = [self._widened(load(self.weight, weight + kw * self.channels, lanes), lanes) for kw in range(conv.kernel[1])]
        kind = f"{self.kind}x{lanes}" if lanes > 1 else self.kind
        for column, uses in sorted(taps.items()):
            held = T.alloc_buffer((1,), kind, scope="local", layout=None)
            T.buffer_store(held, self._widened(load(source, at + column * self.channels, lanes), lanes), [0])
            for j, kw in uses:
                value = tirx.BufferLoad(held, [0])
                total = self.isa.multiply_add(kind, tirx.BufferLoad(accumulators, [j]), value, weights[kw])
                T.buffer_store(accumulators, total, [j])

    def _widened(self, value: Expr, lanes: int) -> Expr:
        return cast(value, "int32", lanes) if self.integer else value

    def _finish(self, value: Expr, index: Expr, channel: Expr | int, lanes: int) -> None:
        if self.integer:
            value = rounded_product(cast(value, "float32", lanes), load(self.multiplier, channel, lanes), lanes)
        if self.residual is not None:
            residual = load(self.residual, index, lanes)
            value = value + dequantized(residual, self.key.dtypes[1], lanes, self.arguments, "b")
        if not self.integer and self.key.dtypes[-1] == "uint8":
            value = rounded_product(value, splat(self.arguments.float("multiplier"), lanes), lanes)
        finish(self.isa, self.output, index, value, lanes, self.arguments, self.key.clipped)
