"""Register tiles of a convolution: the contraction of a few output pixels and channel vectors, and their results.

A tile of output pixels times vectors of output channels stays in registers while the contraction is walked:
kernel rows, then within a row the segments of adjacent input elements, then groups of adjacent elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cpu.buffers import LayerBuffers, clipped_per_channel
from qsearch.kernels.cpu.byte_vectors import narrow_to_bytes, narrow_to_words, transpose_quarters
from qsearch.kernels.cpu.conv_fetch import fetch_next_rows, fetch_residual, fetch_weights
from qsearch.kernels.cpu.conv_plan import ConvPlan
from qsearch.kernels.cpu.epilogue import dequantized, finish
from qsearch.kernels.cpu.vectors import cast, constant, load, narrow, registers, rounded_product, smallest, splat, store

__all__ = ["TileSource", "TileWriter", "unpack_nibbles"]

LARGEST_ROUNDED = 2.0**30


@dataclass(frozen=True)
class TileSource:
    """What a tile reads.

    Attributes:
        image: The input, or its padded copy.
        origin: Index in it of the first tap of output pixel (0, 0).
        weight: Packed weights.
        first: Index of the chunk's first weight.
    """

    image: tirx.Buffer
    origin: Expr | int
    weight: tirx.Buffer
    first: Expr | int


@dataclass(frozen=True)
class TileWriter:
    """Writes the statements of register tiles over one chunk of columns.

    Attributes:
        plan: The kernel.
        buffers: Its arguments.
        source: What the tiles read.
        group: Convolution group.
        chunk: First column of the output, first packed column, number of columns.
        output_base: Index of the image's first output.
    """

    plan: ConvPlan
    buffers: LayerBuffers
    source: TileSource
    group: Expr | int
    chunk: tuple[Expr | int, Expr | int, int]
    output_base: Expr | int

    @property
    def columns(self) -> int:
        """Vectors of output channels."""
        return self.chunk[2]

    def write(self, start: tuple[Expr | int, Expr | int], extent: tuple[int, int], number: Expr | int) -> None:
        """Compute and store a tile.

        Args:
            start: First row and column of output pixels.
            extent: Rows and columns.
            number: Which tile of its block this is.
        """
        plan, lanes, (y, x) = self.plan, self.plan.isa.lanes, start
        pixels = [(i, j) for i in range(extent[0]) for j in range(extent[1])]
        row_stride, col_stride = plan.strides
        width, out_channels = (1 if plan.flat else plan.key.shapes[-1][2]), plan.key.shapes[-1][3]
        kind = "int32" if plan.integer else "float32"
        accumulators = registers(len(pixels) * self.columns, f"{kind}x{lanes}")
        first = self.chunk[1]
        for p in range(len(pixels)):
            for c in range(self.columns):
                start = load(self.buffers.bias, (first + c) * lanes, lanes)
                T.buffer_store(accumulators, start, [p * self.columns + c])
        origin = self.source.origin + y * row_stride + x * col_stride + self.group * plan.in_channels
        offsets = [i * row_stride + j * col_stride for i, j in pixels]
        base = self.output_base + (y * width + x) * out_channels + self.group * plan.out_channels
        if self.buffers.residual is not None:
            firsts = [base + (i * width + j) * out_channels + self.chunk[0] * lanes for i, j in pixels]
            fetch_residual(plan, self.buffers.residual, firsts, self.columns)
        self._contract(accumulators, origin, offsets, number)
        places = [
            (p * self.columns + c, c, base + (i * width + j) * out_channels + self._channel(c))
            for p, (i, j) in enumerate(pixels)
            for c in range(self.columns)
        ]
        packed = len(places) // 4 * 4 if plan.packs_bytes else 0
        for four in range(0, packed, 4):
            self._store_four(accumulators, places[four : four + 4], first)
        for index, c, at in places[packed:]:
            value = self._scaled(tirx.BufferLoad(accumulators, [index]), first + c, at)
            kept = min(lanes, plan.out_channels)
            finish(plan.isa, self.buffers.output, at, value, kept, self.buffers.arguments, plan.key.clipped)

    def _channel(self, c: int) -> Expr | int:
        """First output channel, within the group, of column `c`; the very last column overlaps its neighbour."""
        plan = self.plan
        lanes, channels = plan.isa.lanes, plan.out_channels
        offset = (self.chunk[0] + c) * lanes
        if c == self.columns - 1 and channels % lanes and channels > lanes:
            return smallest(offset, channels - lanes)
        return offset

    def _store_four(self, accumulators: tirx.Buffer, places: list[tuple[int, int, Expr]], first: Expr | int) -> None:
        """Requantize four vectors at once, then store together what is adjacent."""
        plan, arguments = self.plan, self.buffers.arguments
        rounded = []
        for index, c, at in places:
            value = self._scaled(tirx.BufferLoad(accumulators, [index]), first + c, at)
            if not plan.integer:
                # An integer layer's multipliers bound its values; a float one's may not fit int32.
                value = tirx.min(value, constant(LARGEST_ROUNDED, "float32", 16))
            rounded.append(plan.isa.round_to_int(value, 16))
        zero_point = tirx.Cast("int16", arguments.integer("zero_point"))
        halves = [narrow_to_words(rounded[i], rounded[i + 1], zero_point, 64) for i in (0, 2)]
        low, high = (splat(tirx.Cast("uint8", arguments.integer(name)), 64) for name in ("qmin", "qmax"))
        values = tirx.min(tirx.max(transpose_quarters(narrow_to_bytes(halves[0], halves[1], 64)), low), high)
        held = registers(1, "uint8x64")
        T.buffer_store(held, values, [0])
        start = 0
        for end in range(1, 5):
            # Whole columns of one pixel are adjacent; the overlapping one is stored by itself.
            column = places[end][1] if end < 4 else 0
            overlaps = column == self.columns - 1 and plan.out_channels % 16 != 0
            if column == 0 or overlaps:
                part = narrow(tirx.BufferLoad(held, [0]), 64, 16 * (end - start), 16 * start)
                store(self.buffers.output, places[start][2], part, 16 * (end - start))
                start = end

    def _contract(self, accumulators: tirx.Buffer, origin: Expr, offsets: list[int], number: Expr | int) -> None:
        """Add every contraction step to the accumulators, fetching ahead."""
        plan, source = self.plan, self.source
        _, count, groups = plan.steps
        step_weights = self.columns * plan.isa.lanes * plan.group

        def step(row: Expr | int, segment: Expr | int, i: Expr | int) -> None:
            done = (row * count + segment) * groups + i
            at = origin + row * (plan.key.conv.dilation[0] * plan.row) + segment * plan.segments[2] + i * plan.group
            self._step(accumulators, at, offsets, source.first + done * step_weights)
            fetch_weights(plan, source.weight, (source.first, self.columns), done, number)
            fetch_next_rows(plan, source.image, origin + len(offsets) * plan.strides[0], i)

        _nest(plan.steps, step)

    def _step(self, accumulators: tirx.Buffer, at: Expr, offsets: list[int], weights: Expr) -> None:
        plan, width = self.plan, self.plan.isa.lanes * self.plan.group
        columns = [load(self.source.weight, weights + c * width, width) for c in range(self.columns)]
        for p, offset in enumerate(offsets):
            activation = load(self.source.image, at + offset, plan.group)
            if plan.integer:
                activation = tirx.reinterpret("int32", activation)
            for c, weight in enumerate(columns):
                index = p * self.columns + c
                T.buffer_store(accumulators, self._add(tirx.BufferLoad(accumulators, [index]), activation, weight), [index])

    def _add(self, current: Expr, activation: Expr, weight: Expr) -> Expr:
        """One step of one accumulator."""
        isa, precision = self.plan.isa, self.plan.key.precision
        if precision == "fp32":
            return isa.multiply_add(f"float32x{isa.lanes}", current, splat(activation, isa.lanes), weight)
        return (isa.dot_pairs if precision == "int16" else isa.dot)(current, activation, weight)

    def _scaled(self, value: Expr, column: Expr | int, index: Expr) -> Expr:
        """One vector of accumulators in the unit of the output, residual added, clipped per channel.

        Args:
            value: int32 or float32 x lanes.
            column: Packed column, for its multipliers.
            index: Where the output is stored, and the residual read.
        """
        plan, buffers = self.plan, self.buffers
        lanes = plan.isa.lanes
        kept = min(lanes, plan.out_channels)
        if plan.integer:
            multiplier = load(buffers.multiplier, column * lanes, lanes)
            value = rounded_product(cast(value, "float32", lanes), multiplier, lanes)
        value = narrow(value, lanes, kept)
        if buffers.residual is not None:
            residual = load(buffers.residual, index, kept)
            value = value + dequantized(residual, plan.key.dtypes[1], kept, buffers.arguments, "b")
        if not plan.integer and plan.key.dtypes[-1] != "float32":
            value = rounded_product(value, splat(buffers.arguments.float("multiplier"), kept), kept)
        return clipped_per_channel(buffers, value, column * lanes, kept)


def _nest(extents: tuple[int, ...], body: Callable[..., None], *indices: Expr | int) -> None:
    """Nested serial loops; extents of one make no loop."""
    if len(indices) == len(extents):
        body(*indices)
    elif extents[len(indices)] == 1:
        _nest(extents, body, *indices, 0)
    else:
        with T.serial(0, extents[len(indices)]) as i:
            _nest(extents, body, *indices, i)


def unpack_nibbles(packed: tirx.Buffer, vector: Expr | int, count: int, width: int) -> tirx.Buffer:
    """Unpack 4-bit weights into scratch memory, once for all the pixels of a block.

    Args:
        packed: int8, two weights to a byte, each plus eight.
        vector: First weight vector.
        count: Even number of weight vectors.
        width: Elements of a vector.

    Returns:
        int8 (count * width,).
    """
    scratch = T.alloc_buffer((count * width,), "int8", scope="global", layout=None, align=64)
    low, eight = constant(15, "uint8", width), constant(8, "uint8", width)
    with T.serial(0, count // 2) as i:
        pair = tirx.reinterpret(f"uint8x{width}", load(packed, (tirx.floordiv(vector, 2) + i) * width, width))
        for half, value in enumerate((pair & low, pair >> constant(4, "uint8", width))):
            store(scratch, (2 * i + half) * width, tirx.reinterpret(f"int8x{width}", value - eight), width)
    return scratch
