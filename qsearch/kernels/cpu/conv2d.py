"""Dense and grouped convolution and linear layers: blocked direct convolution over register tiles.

A tile of output pixels times vectors of output channels stays in registers while the kernel walks the
contraction: kernel rows, then within a row the segments of adjacent input elements, then groups of
`dot_group` elements. Padding is a copy of the image in scratch memory, filled with the zero point. The last
vector of output channels overlaps its neighbour where the channel count is no multiple of the lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cpu.buffers import LayerBuffers, declare_layer
from qsearch.kernels.cpu.byte_vectors import narrow_to_bytes, narrow_to_words, transpose_quarters
from qsearch.kernels.cpu.conv_pack import pack_constants, pack_weight
from qsearch.kernels.cpu.conv_plan import PREFETCH_STEPS, ConvPlan
from qsearch.kernels.cpu.epilogue import dequantized, finish
from qsearch.kernels.cpu.isa import Isa
from qsearch.kernels.cpu.padding import padded_copy, padded_image
from qsearch.kernels.cpu.vectors import cast, constant, kernel, load, narrow, rounded_product, splat, store
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["conv2d"]

LARGEST_ROUNDED = 2.0**30


def conv2d(key: OpKey, isa: Isa, threads: int) -> Kernel | None:
    """Describe the kernel of a convolution with float32 or int8 weights, or None for another operation.

    Args:
        key: kind 'conv2d'; shapes ((N, H, W, C), [(N, OH, OW, O) residual], (N, OH, OW, O)).
        isa: Instruction set.
        threads: Threads to share the work between.
    """
    if key.kind != "conv2d" or key.precision not in ("fp32", "int8"):
        return None
    plan = ConvPlan(key, isa)
    image = key.shapes[0][1:]
    workspace = padded_image(image, key.conv.padding, key.dtypes[0]).bytes if plan.copies else 0
    variant = (isa.name, plan.tile, plan.block_rows, plan.prefetches)
    return Kernel(
        key, variant, lambda s: _generate(plan, s), lambda c: pack_constants(plan, c), workspace, lambda w: pack_weight(plan, w)
    )


def _generate(plan: ConvPlan, symbol: str) -> tirx.PrimFunc:
    def body() -> None:
        total = plan.key.conv.groups * plan.columns
        buffers = declare_layer(plan.key, total * plan.column_weights, total * plan.isa.lanes)
        images, height, width, channels = plan.key.shapes[0]
        out_size = int(np.prod(plan.key.shapes[-1][1:]))
        if plan.flat or images == 1:
            _one_image(plan, buffers, 0, 0)
        else:
            with T.serial(0, images) as n:
                _one_image(plan, buffers, n * (height * width * channels), n * out_size)

    return kernel(symbol, body)


def _one_image(plan: ConvPlan, buffers: LayerBuffers, source_base: Expr | int, output_base: Expr | int) -> None:
    source = buffers.source
    if plan.copies:
        fill = tirx.const(0.0, "float32")
        if plan.integer:
            fill = tirx.Cast("uint8", buffers.arguments.integer("a_zero_point"))
        source = padded_copy(source, source_base, plan.key.shapes[0][1:], plan.key.conv.padding, fill)
        source_base = 0
    walk = _Walk(plan, buffers, source, source_base, output_base)
    groups = plan.key.conv.groups
    if groups == 1:
        walk.group(0)
    else:
        with T.serial(0, groups) as g:
            walk.group(g)


@dataclass(frozen=True)
class _Walk:
    """The loops over one image's output."""

    plan: ConvPlan
    buffers: LayerBuffers
    source: tirx.Buffer
    source_base: Expr | int
    output_base: Expr | int

    def group(self, g: Expr | int) -> None:
        """All outputs of convolution group `g`."""
        plan = self.plan
        rows, cols = plan.grid

        def chunk(column: Expr | int, columns: int, y0: Expr | int, count: int, last: bool) -> None:
            tile = _TileWriter(self, g, column, columns, last)
            _split(
                y0, count, plan.tile.rows, lambda y, ty: _split(0, cols, plan.tile.cols, lambda x, tx: tile.write(y, x, ty, tx))
            )

        def block(y0: Expr | int, count: int) -> None:
            nr = plan.tile.columns
            whole, rest = divmod(plan.columns, nr)
            with T.serial(0, whole) as i:
                chunk(i * nr, nr, y0, count, last=rest == 0)
            if rest:
                chunk(whole * nr, rest, y0, count, last=True)

        _split(0, rows, plan.block_rows, block)


def _split(start: Expr | int, total: int, size: int, body: Callable[[Expr | int, int], None]) -> None:
    """Call body(offset, length) over `total` from `start`: whole pieces in a loop, the remainder after it."""
    whole, rest = divmod(total, size)
    if whole == 1:
        body(start, size)
    elif whole:
        with T.serial(0, whole) as i:
            body(start + i * size, size)
    if rest:
        body(start + whole * size, rest)


@dataclass(frozen=True)
class _TileWriter:
    """Writes the statements of register tiles over `columns` vectors of output channels from `column`."""

    walk: _Walk
    group: Expr | int
    column: Expr | int
    columns: int
    last: bool

    def write(self, y: Expr | int, x: Expr | int, ty: int, tx: int) -> None:
        """Compute and store ty x tx output pixels from output position (y, x)."""
        plan, lanes = self.walk.plan, self.walk.plan.isa.lanes
        pixels = [(i, j) for i in range(ty) for j in range(tx)]
        row_stride, col_stride = plan.strides
        width, out_channels = (1 if plan.flat else plan.key.shapes[-1][2]), plan.key.shapes[-1][3]
        kind = "int32" if plan.integer else "float32"
        accumulators = T.alloc_buffer((len(pixels) * self.columns,), f"{kind}x{lanes}", scope="local", layout=None)
        first = self.group * plan.columns + self.column
        for p in range(len(pixels)):
            for c in range(self.columns):
                start = load(self.walk.buffers.bias, (first + c) * lanes, lanes)
                T.buffer_store(accumulators, start, [p * self.columns + c])
        origin = self.walk.source_base + y * row_stride + x * col_stride + self.group * plan.in_channels
        offsets = [i * row_stride + j * col_stride for i, j in pixels]
        self._contract(accumulators, origin, offsets, first)
        base = self.walk.output_base + (y * width + x) * out_channels + self.group * plan.out_channels
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
            finish(plan.isa, self.walk.buffers.output, at, value, kept, self.walk.buffers.arguments, plan.key.clipped)

    def _channel(self, c: int) -> Expr | int:
        """First output channel, within the group, of column `c` of the chunk; the very last column overlaps its neighbour."""
        plan = self.walk.plan
        lanes, channels = plan.isa.lanes, plan.out_channels
        offset = (self.column + c) * lanes
        if self.last and c == self.columns - 1 and channels % lanes and channels > lanes:
            return tirx.min(offset, channels - lanes) if isinstance(offset, Expr) else channels - lanes
        return offset

    def _store_four(self, accumulators: tirx.Buffer, places: list[tuple[int, int, Expr]], first: Expr | int) -> None:
        """Requantize four vectors at once, then store together what is adjacent."""
        plan, arguments = self.walk.plan, self.walk.buffers.arguments
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
        held = T.alloc_buffer((1,), "uint8x64", scope="local", layout=None)
        T.buffer_store(held, values, [0])
        start = 0
        for end in range(1, 5):
            # Whole columns of one pixel are adjacent; the overlapping one is stored by itself.
            adjacent = (
                end < 4 and places[end][1] == places[end - 1][1] + 1 and not (self.last and places[end][1] == self.columns - 1)
            )
            if not adjacent:
                part = narrow(tirx.BufferLoad(held, [0]), 64, 16 * (end - start), 16 * start)
                store(self.walk.buffers.output, places[start][2], part, 16 * (end - start))
                start = end

    def _contract(self, accumulators: tirx.Buffer, origin: Expr, offsets: list[int], first: Expr | int) -> None:
        """Add every contraction step to the accumulators."""
        plan = self.walk.plan
        rows, count, groups = plan.steps
        step_weights = self.columns * plan.isa.lanes * plan.group
        weight_base = first * plan.column_weights

        def step(row: Expr | int, segment: Expr | int, i: Expr | int) -> None:
            weights = weight_base + ((row * count + segment) * groups + i) * step_weights
            at = origin + row * (plan.key.conv.dilation[0] * plan.row) + segment * plan.segments[2] + i * plan.group
            self._step(accumulators, at, offsets, weights, step_weights)

        _nest((rows, count, groups), step)

    def _step(self, accumulators: tirx.Buffer, at: Expr, offsets: list[int], weights: Expr, step_weights: int) -> None:
        plan, width = self.walk.plan, self.walk.plan.isa.lanes * self.walk.plan.group
        columns = [load(self.walk.buffers.weight, weights + c * width, width) for c in range(self.columns)]
        if plan.prefetches:
            for c in range(self.columns):
                _prefetch(self.walk.buffers.weight, weights + PREFETCH_STEPS * step_weights + c * width)
        for p, offset in enumerate(offsets):
            activation = load(self.walk.source, at + offset, plan.group)
            if plan.integer and plan.group > 1:
                activation = tirx.reinterpret("int32", activation)
            for c, weight in enumerate(columns):
                index = p * self.columns + c
                current = tirx.BufferLoad(accumulators, [index])
                if plan.integer:
                    value = plan.isa.dot(current, activation, weight)
                else:
                    value = plan.isa.multiply_add(f"float32x{plan.isa.lanes}", current, splat(activation, plan.isa.lanes), weight)
                T.buffer_store(accumulators, value, [index])

    def _scaled(self, value: Expr, column: Expr | int, index: Expr) -> Expr:
        """One vector of accumulators in the unit of the output, residual added.

        Args:
            value: int32 or float32 x lanes.
            column: Packed column, for its multipliers.
            index: Where the output is stored, and the residual read.
        """
        plan, buffers = self.walk.plan, self.walk.buffers
        lanes = plan.isa.lanes
        kept = min(lanes, plan.out_channels)
        if plan.integer:
            multiplier = load(buffers.multiplier, column * lanes, lanes)
            value = rounded_product(cast(value, "float32", lanes), multiplier, lanes)
        value = narrow(value, lanes, kept)
        if buffers.residual is not None:
            residual = load(buffers.residual, index, kept)
            value = value + dequantized(residual, plan.key.dtypes[1], kept, buffers.arguments, "b")
        if not plan.integer and plan.key.dtypes[-1] == "uint8":
            value = rounded_product(value, splat(buffers.arguments.float("multiplier"), kept), kept)
        return value


def _nest(extents: tuple[int, ...], body: Callable[..., None], *indices: Expr | int) -> None:
    """Nested serial loops; extents of one make no loop."""
    if len(indices) == len(extents):
        body(*indices)
    elif extents[len(indices)] == 1:
        _nest(extents, body, *indices, 0)
    else:
        with T.serial(0, extents[len(indices)]) as i:
            _nest(extents, body, *indices, i)


def _prefetch(buffer: tirx.Buffer, index: Expr) -> None:
    """Fetch a weight line for reading into every cache level; addresses beyond the end are harmless."""
    address = T.address_of(tirx.BufferLoad(buffer, [index]))
    T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, *(tirx.const(i, "int32") for i in (0, 3, 1))))
