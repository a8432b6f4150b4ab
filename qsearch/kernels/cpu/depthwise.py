"""Depthwise convolution: lanes are channels, a tile is a run of output columns of one row.

Every input vector of a kernel row is loaded once and used by all the output columns it reaches. Nothing is
copied: tiles at the left and right edge know which of their taps are padding, rows above and below are decided
row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cpu.buffers import LayerBuffers, channel_constants, clipped_per_channel, declare_layer
from qsearch.kernels.cpu.conv_plan import LAYER_PRECISIONS
from qsearch.kernels.cpu.epilogue import dequantized, finish
from qsearch.kernels.cpu.isa import Isa
from qsearch.kernels.cpu.vectors import (
    SHARED_ELEMENTS,
    cast,
    constant,
    for_blocks,
    kernel,
    load,
    loop,
    registers,
    rounded_product,
    splat,
    vector_type,
)
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["depthwise"]

MAX_TILE_COLUMNS = 8


def depthwise(key: OpKey, isa: Isa, threads: int) -> Kernel | None:
    """Describe the kernel of a depthwise convolution, or None for another operation.

    Args:
        key: kind 'conv2d' with groups = input channels = output channels; shapes as for conv2d.
        isa: Instruction set.
        threads: Threads to share the work between.
    """
    if key.kind != "conv2d" or key.precision not in LAYER_PRECISIONS:
        return None
    channels = key.shapes[0][3]
    if key.conv.groups != channels or key.shapes[-1][3] != channels or channels == 1:
        return None
    columns = _tile_columns(key.shapes[-1][2], isa)
    variant = (isa.name, columns)
    return Kernel(key, variant, lambda s: _generate(key, isa, threads, s), lambda c: _pack(key, c), 0, _pack_weight)


def _tile_columns(width: int, isa: Isa) -> int:
    """The widest tile that leaves the smallest remainder: fewest tiles first, then the least imbalance."""
    most = min(MAX_TILE_COLUMNS, width, isa.registers // 2 - 2)
    return min(range(1, most + 1), key=lambda n: (-(-width // n), n))


def _pack(key: OpKey, constants: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return (*(constants[name] for name in channel_constants(key)), constants["integers"], constants["floats"])


def _pack_weight(constants: dict[str, np.ndarray]) -> np.ndarray:
    """(C, kh, kw, 1) -> flat (kh, kw, C); 4-bit weights are held as bytes, groups applied."""
    return np.ascontiguousarray(constants["weight"][..., 0].transpose(1, 2, 0)).ravel()


def _generate(key: OpKey, isa: Isa, threads: int, symbol: str) -> tirx.PrimFunc:
    def body() -> None:
        channels = key.shapes[0][3]
        buffers = declare_layer(key, int(np.prod(key.conv.kernel)) * channels, channels, align=4)
        images, height, width, _ = key.shapes[0]
        _, out_height, out_width, _ = key.shapes[-1]
        shared = threads if images * out_height * out_width * channels > SHARED_ELEMENTS else 1
        with loop(images * out_height, shared) as i:
            n, y = tirx.floordiv(i, out_height), tirx.floormod(i, out_height)

            def block(channel: Expr | int, lanes: int) -> None:
                source = n * (height * width * channels) + channel
                output = (n * out_height + y) * (out_width * channels) + channel
                _Row(key, isa, buffers, y, channel, lanes, source, output).write(_tile_columns(out_width, isa))

            for_blocks(channels, isa.lanes, block)

    return kernel(symbol, body)


@dataclass(frozen=True)
class _Row:
    """One output row of one block of channels.

    Attributes:
        key: The operation.
        isa: Instruction set.
        buffers: The kernel's arguments.
        y: Output row.
        channel: First channel of the block.
        lanes: Channels of the block.
        source: Index of the image's first pixel at `channel`.
        output: Index of the output row's first pixel at `channel`.
    """

    key: OpKey
    isa: Isa
    buffers: LayerBuffers
    y: Expr
    channel: Expr | int
    lanes: int
    source: Expr
    output: Expr

    @property
    def integer(self) -> bool:
        """True if products are summed in int32, False for float32."""
        return self.key.precision != "fp32"

    @property
    def kind(self) -> str:
        """Dtype of an accumulator."""
        return vector_type("int32" if self.integer else "float32", self.lanes)

    def write(self, columns: int) -> None:
        """Write the row: tiles that reach the padding one by one, those between them in a loop."""
        width, stride = self.key.shapes[-1][2], self.key.conv.stride[1]
        whole = width // columns
        inside = [i for i in range(whole) if self._inside(i * columns, columns)]
        first, last = (inside[0], inside[-1] + 1) if inside else (whole, whole)
        for i in range(first):
            self._tile(i * columns * stride, i * columns, columns, i * columns)
        if last > first:
            with T.serial(first, last) as i:
                self._tile(i * (columns * stride), i * columns, columns, None)
        for i in range(last, whole):
            self._tile(i * columns * stride, i * columns, columns, i * columns)
        if width % columns:
            self._tile(whole * columns * stride, whole * columns, width % columns, whole * columns)

    def _inside(self, x: int, columns: int) -> bool:
        """True if a tile from output column x reads no padding."""
        conv = self.key.conv
        begin = x * conv.stride[1] - conv.padding[1]
        end = begin + (columns - 1) * conv.stride[1] + (conv.kernel[1] - 1) * conv.dilation[1]
        return begin >= 0 and end < self.key.shapes[0][2]

    def _tile(self, begin: Expr | int, x: Expr | int, columns: int, edge: int | None) -> None:
        """Compute `columns` output pixels.

        Args:
            begin: Padded input column of the first tap.
            x: Output column of the first pixel.
            columns: Number of pixels.
            edge: x as a number where the tile may reach the padding, None where it does not.
        """
        conv, (_, height, _, _) = self.key.conv, self.key.shapes[0]
        accumulators = registers(columns, self.kind)
        for j in range(columns):
            T.buffer_store(accumulators, load(self.buffers.bias, self.channel, self.lanes), [j])
        with T.serial(0, conv.kernel[0]) as kh:
            row = self.y * conv.stride[0] + kh * conv.dilation[0] - conv.padding[0]
            if not (conv.padding[0] or conv.padding[2]):
                self._taps(accumulators, columns, kh, self._column(row, begin), edge)
            else:
                with T.If(tirx.all(row >= 0, row < height)):
                    with T.Then():
                        self._taps(accumulators, columns, kh, self._column(row, begin), edge)
                    # A row of padding adds nothing to a float sum, but zero points to an integer one.
                    if self.integer:
                        with T.Else():
                            self._taps(accumulators, columns, kh, None, edge)
        for j in range(columns):
            self._store(tirx.BufferLoad(accumulators, [j]), self.output + (x + j) * self.key.shapes[0][3])

    def _column(self, row: Expr, begin: Expr | int) -> Expr:
        """Index of a tile's first tap in an input row; may lie before the row where taps there are padding."""
        _, _, width, channels = self.key.shapes[0]
        return self.source + (row * width + begin - self.key.conv.padding[1]) * channels

    def _taps(self, accumulators: tirx.Buffer, columns: int, kh: Expr, at: Expr | None, edge: int | None) -> None:
        """Add one kernel row: each input column once, for every output column it reaches.

        Args:
            accumulators: One vector per output column.
            columns: Number of output columns.
            kh: Kernel row.
            at: Index of the first tap, None if the whole row is padding.
            edge: As for `_tile`.
        """
        conv, (_, _, width, channels) = self.key.conv, self.key.shapes[0]
        first = kh * (conv.kernel[1] * channels) + self.channel
        weights = [self._widened(load(self.buffers.weight, first + kw * channels, self.lanes)) for kw in range(conv.kernel[1])]
        for column, uses in sorted(_columns_read(self.key, columns).items()):
            outside = edge is not None and not 0 <= edge * conv.stride[1] - conv.padding[1] + column < width
            if at is not None and not outside:
                value = self._widened(load(self.buffers.source, at + column * channels, self.lanes))
            elif self.integer:
                value = self._padding()
            else:
                continue
            held = registers(1, self.kind)
            T.buffer_store(held, value, [0])
            for j, kw in uses:
                total = self._add(tirx.BufferLoad(accumulators, [j]), tirx.BufferLoad(held, [0]), weights[kw])
                T.buffer_store(accumulators, total, [j])

    def _add(self, total: Expr, value: Expr, weight: Expr) -> Expr:
        # Activations of 16 bits have a sign, which `multiply_add` does not take.
        return total + value * weight if self.key.precision == "int16" else self.isa.multiply_add(self.kind, total, value, weight)

    def _padding(self) -> Expr:
        """What a padded position holds: the input's zero point."""
        if self.key.precision == "int16":
            return constant(0, "int32", self.lanes)
        return splat(self.buffers.arguments.integer("a_zero_point"), self.lanes)

    def _widened(self, value: Expr) -> Expr:
        return cast(value, "int32", self.lanes) if self.integer else value

    def _store(self, value: Expr, index: Expr) -> None:
        key, buffers, lanes = self.key, self.buffers, self.lanes
        if buffers.multiplier is not None:
            multiplier = load(buffers.multiplier, self.channel, lanes)
            value = rounded_product(cast(value, "float32", lanes), multiplier, lanes)
        if buffers.residual is not None:
            residual = load(buffers.residual, index, lanes)
            value = value + dequantized(residual, key.dtypes[1], lanes, buffers.arguments, "b")
        if not self.integer and key.dtypes[-1] != "float32":
            value = rounded_product(value, splat(buffers.arguments.float("multiplier"), lanes), lanes)
        value = clipped_per_channel(buffers, value, self.channel, lanes)
        finish(self.isa, buffers.output, index, value, lanes, buffers.arguments, key.clipped)


def _columns_read(key: OpKey, columns: int) -> dict[int, list[tuple[int, int]]]:
    """Input column of a tile -> the (output column, kernel column) pairs that read it."""
    reads: dict[int, list[tuple[int, int]]] = {}
    for j in range(columns):
        for kw in range(key.conv.kernel[1]):
            reads.setdefault(j * key.conv.stride[1] + kw * key.conv.dilation[1], []).append((j, kw))
    return reads
