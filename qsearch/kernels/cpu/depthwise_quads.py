"""Depthwise int8 convolution, four kernel rows to a dot product.

A block of channels is worked on for a few output rows at a time. First every input column is interleaved into
scratch memory: the same channel of four input rows side by side, 'quads', with the zero point where a row or
column lies outside the image. Then every output column accumulates: one dot adds four kernel rows of one
kernel column. Two output rows read the same quads with the weights shifted by a row, so that 3 x 3 kernels fill
all four places. Edges cost nothing in the second step, and any stride, dilation, padding and zero point works.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cpu.buffers import LayerBuffers, declare_layer
from qsearch.kernels.cpu.byte_vectors import channel_order, dot_quads, interleave, narrow_to_bytes, narrow_to_words, round_lanes
from qsearch.kernels.cpu.isa import Isa
from qsearch.kernels.cpu.vectors import cast, constant, kernel, load, loop, registers, rounded_product, splat, store
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["depthwise_quads"]

WIDTHS = (64, 32, 16)
MAX_ROWS = 3
# Outputs below which another thread is not worth waking.
SHARED_ABOVE = 64 * 1024
# Cost of turning four accumulators into bytes, of interleaving four rows, and of a dot, whose operands are both loaded;
# measured on 3 x 3 and 5 x 5 layers.
EPILOGUE, INTERLEAVE, DOT = 15, 8, 2


def depthwise_quads(key: OpKey, isa: Isa, threads: int) -> Kernel | None:
    """Describe the kernel of an int8 depthwise convolution from uint8 to uint8, or None for another operation.

    Args:
        key: kind 'conv2d' with groups = input channels = output channels >= 16; shapes as for conv2d.
        isa: Instruction set; must dot bytes.
        threads: Threads to share the work between.
    """
    channels = key.shapes[0][-1]
    if key.kind != "conv2d" or key.precision not in ("int8", "w4a8") or not isa.dots_quads:
        return None
    if key.conv.groups != channels or key.shapes[-1][3] != channels or channels < WIDTHS[-1]:
        return None
    if set(key.dtypes) != {"uint8"} or key.residual:
        return None
    plan = _Plan(key)
    return Kernel(
        key,
        (isa.name, "quads", plan.rows),
        lambda symbol: kernel(symbol, lambda: _generate(plan, threads)),
        plan.pack,
        plan.scratch_bytes * threads,
        plan.pack_weight,
    )


@dataclass(frozen=True)
class _Plan:
    """Every static number of the kernel."""

    key: OpKey

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """(first channel, channels) of every block; the last overlaps where channels are no multiple of 16."""
        total, first, found = self.key.shapes[0][3], 0, []
        while first < total:
            width = next((w for w in WIDTHS if first + w <= total), WIDTHS[-1])
            found.append((min(first, total - width), width))
            first += width
        return found

    @cached_property
    def rows(self) -> int:
        """Output rows of a tile: those that need the fewest instructions for each."""
        return min(range(1, min(MAX_ROWS, self.key.shapes[-1][1]) + 1), key=self._row_cost)

    def _row_cost(self, rows: int) -> float:
        """Cost of one output row, averaged over whole and remaining tiles."""
        conv, height = self.key.conv, self.key.shapes[-1][1]
        quads = -(-len(self._used_rows(rows)) // 4)
        dots = DOT * 4 * conv.kernel[1] * sum(len(self._quads_of(r, rows)) for r in range(rows))
        tile = conv.stride[1] * quads * INTERLEAVE + dots + rows * EPILOGUE
        return tile * -(-height // rows) / height

    def _used_rows(self, rows: int) -> list[int]:
        """Input rows, relative to a tile's first tap, that its output rows read."""
        conv = self.key.conv
        return sorted({r * conv.stride[0] + kh * conv.dilation[0] for r in range(rows) for kh in range(conv.kernel[0])})

    def _quads_of(self, r: int, rows: int) -> list[int]:
        """Quads that output row `r` of a tile reads."""
        used, conv = self._used_rows(rows), self.key.conv
        taps = (r * conv.stride[0] + kh * conv.dilation[0] for kh in range(conv.kernel[0]))
        return sorted({used.index(tap) // 4 for tap in taps})

    @cached_property
    def slots(self) -> list[int]:
        """Input row of every place in the quads, relative to a tile's first tap."""
        return self._used_rows(self.rows)

    @cached_property
    def quads(self) -> int:
        """Quads of an input column."""
        return -(-len(self.slots) // 4)

    @cached_property
    def terms(self) -> list[tuple[int, int, int]]:
        """(kernel column, output row, quad) of every dot of an output column, in the order of the weights."""
        rows = range(self.rows)
        return [(kw, r, q) for kw in range(self.key.conv.kernel[1]) for r in rows for q in self._quads_of(r, self.rows)]

    @property
    def input_columns(self) -> int:
        """Input columns that the output reads, padding included."""
        conv = self.key.conv
        return (self.key.shapes[-1][2] - 1) * conv.stride[1] + (conv.kernel[1] - 1) * conv.dilation[1] + 1

    @property
    def weights_at(self) -> int:
        """Where a block's weights start in scratch memory, behind the quads."""
        return self.input_columns * self.quads * 4 * WIDTHS[0]

    @property
    def results_at(self) -> int:
        """Where a tile's results start in scratch memory."""
        return self.weights_at + 4 * len(self.terms) * WIDTHS[0]

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch memory of one thread."""
        return self.results_at + self.rows * self.key.shapes[-1][2] * WIDTHS[0]

    def pack(self, constants: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        """Bias and multiplier by block in the order of the lanes; then the scalars."""
        rows = [
            np.concatenate([constants[name][self._channels(block)] for block in self.blocks]) for name in ("bias", "multiplier")
        ]
        return (*rows, constants["integers"], constants["floats"])

    def _channels(self, block: tuple[int, int]) -> np.ndarray:
        return block[0] + channel_order(block[1]).ravel()

    def pack_weight(self, weight: np.ndarray) -> np.ndarray:
        """int8 (C, kh, kw, 1) -> by block, term, vector, lane: the weights of the four rows of a quad."""
        conv, parts = self.key.conv, []
        for block in self.blocks:
            chosen = weight[self._channels(block), :, :, 0]
            for kw, r, q in self.terms:
                places = np.zeros((block[1], 4), np.int8)
                for kh in range(conv.kernel[0]):
                    place = self.slots.index(r * conv.stride[0] + kh * conv.dilation[0]) - 4 * q
                    if 0 <= place < 4:
                        places[:, place] = chosen[:, kh, kw]
                parts.append(places.ravel())
        return np.concatenate(parts)


def _generate(plan: _Plan, threads: int) -> None:
    images, height, width, channels = plan.key.shapes[0]
    _, out_height, out_width, _ = plan.key.shapes[-1]
    packed = sum(block[1] for block in plan.blocks)
    buffers = declare_layer(plan.key, packed * len(plan.terms) * 4, packed, align=16)
    tiles = -(-out_height // plan.rows)
    shared = threads if images * out_height * out_width * channels > SHARED_ABOVE else 1
    with loop(images * tiles, shared) as i:
        scratch = T.alloc_buffer((plan.scratch_bytes,), "uint8", scope="global", layout=None, align=64)
        n, y = tirx.floordiv(i, tiles), tirx.floormod(i, tiles) * plan.rows
        at, first = n * (height * width * channels), n * (out_height * out_width * channels)
        for (offset, lanes), count, done in _runs(plan.blocks):
            with loop(count) as b:
                channel = offset + b * lanes
                part = done + b * lanes
                block = _Block(plan, buffers, scratch, lanes, part, y)
                block.interleave(at + channel)
                block.compute(first + y * (out_width * channels) + channel)


def _runs(blocks: list[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], int, int]]:
    """Adjacent blocks of one width as (first block, count, channels packed before)."""
    done = index = 0
    while index < len(blocks):
        first, width = blocks[index]
        count = 1
        while index + count < len(blocks) and blocks[index + count] == (first + count * width, width):
            count += 1
        yield (first, width), count, done
        done += count * width
        index += count


@dataclass(frozen=True)
class _Block:
    """One block of channels for one tile of output rows.

    Attributes:
        plan: The kernel.
        buffers: Its arguments.
        scratch: The quads, by input column, quad and vector.
        width: Channels of the block.
        part: Channels packed before it.
        y: First output row.
    """

    plan: _Plan
    buffers: LayerBuffers
    scratch: tirx.Buffer
    width: int
    part: Expr
    y: Expr

    def interleave(self, source: Expr) -> None:
        """Fill the quads of every input column.

        Args:
            source: Index of the image's first pixel at the block's first channel.
        """
        plan, conv = self.plan, self.plan.key.conv
        height = plan.key.shapes[0][1]
        top = self.y * conv.stride[0] - conv.padding[0]
        bottom = top + plan.slots[-1]
        padded = conv.padding[0] or conv.padding[2] or plan.key.shapes[-1][1] % plan.rows
        if not padded:
            self._columns(source, top, False)
            return
        with T.If(tirx.all(top >= 0, bottom < height)):
            with T.Then():
                self._columns(source, top, False)
            with T.Else():
                self._columns(source, top, True)

    def _columns(self, source: Expr, top: Expr, partly: bool) -> None:
        """Every input column; `partly` if some rows lie outside the image."""
        plan, conv = self.plan, self.plan.key.conv
        _, _, width, channels = plan.key.shapes[0]
        left = min(conv.padding[1], plan.input_columns)
        inside = max(0, min(width, plan.input_columns - left))
        zero = splat(tirx.Cast("uint8", self.buffers.arguments.integer("a_zero_point")), self.width)
        for first, count in ((0, left), (left + inside, plan.input_columns - left - inside)):
            with loop(count) as x:
                for i in range(4 * plan.quads):
                    store(self.scratch, ((first + x) * (4 * plan.quads) + i) * self.width, zero, self.width)
        with loop(inside) as x:
            rows = [self._row(source + x * channels, top + slot, partly, zero) for slot in plan.slots]
            rows += [constant(0, "uint8", self.width)] * (4 * plan.quads - len(rows))
            for q in range(plan.quads):
                for v, vector in enumerate(interleave(rows[4 * q : 4 * q + 4], self.width)):
                    index = ((left + x) * (4 * plan.quads) + 4 * q + v) * self.width
                    store(self.scratch, index, vector, self.width)

    def _row(self, column: Expr, row: Expr, partly: bool, zero: Expr) -> Expr:
        """The block's channels of one pixel, or zero points."""
        _, height, width, channels = self.plan.key.shapes[0]
        held = registers(1, f"uint8x{self.width}")
        if not partly:
            T.buffer_store(held, load(self.buffers.source, column + row * (width * channels), self.width), [0])
            return tirx.BufferLoad(held, [0])
        with T.If(tirx.all(row >= 0, row < height)):
            with T.Then():
                T.buffer_store(held, load(self.buffers.source, column + row * (width * channels), self.width), [0])
            with T.Else():
                T.buffer_store(held, zero, [0])
        return tirx.BufferLoad(held, [0])

    def compute(self, output: Expr) -> None:
        """Every output column of the tile of rows, then their copy to the output.

        The weights are read from scratch memory, and the results written to it, so that the compiler cannot keep
        all the weights in registers across columns: there are more of them than registers, and the stack it would
        spill them to is not aligned.

        Args:
            output: Index of the first output pixel at the block's first channel.
        """
        plan, width = self.plan, self.width
        _, out_height, out_width, channels = plan.key.shapes[-1]
        with loop(4 * len(plan.terms)) as i:
            weight = load(self.buffers.weight, self.part * (4 * len(plan.terms)) + i * width, width)
            store(self.scratch, plan.weights_at + i * width, tirx.reinterpret(f"uint8x{width}", weight), width)
        with loop(out_width) as x:
            for r in range(plan.rows):
                store(self.scratch, plan.results_at + (x * plan.rows + r) * width, self._pixel(x, r), width)
        with loop(out_width) as x:
            for r in range(plan.rows):
                value = load(self.scratch, plan.results_at + (x * plan.rows + r) * width, width)
                index = output + (r * out_width + x) * channels
                if out_height % plan.rows == 0 or r == 0:
                    store(self.buffers.output, index, value, width)
                    continue
                with T.If(self.y + r < out_height), T.Then():
                    store(self.buffers.output, index, value, width)

    def _pixel(self, x: Expr, r: int) -> Expr:
        """The block's channels of output column `x`, row `r` of the tile."""
        integer = self.buffers.arguments.integer
        zero_point = tirx.Cast("int16", integer("zero_point"))
        rounded = [self._vector(v, x, r) for v in range(4)]
        halves = [narrow_to_words(rounded[i], rounded[i + 1], zero_point, self.width) for i in (0, 2)]
        low, high = (splat(tirx.Cast("uint8", integer(name)), self.width) for name in ("qmin", "qmax"))
        return tirx.min(tirx.max(narrow_to_bytes(halves[0], halves[1], self.width), low), high)

    def _vector(self, v: int, x: Expr, r: int) -> Expr:
        """Vector `v` of four of an output pixel, scaled and rounded to int32."""
        plan, lanes, conv = self.plan, self.width // 4, self.plan.key.conv
        total = load(self.buffers.bias, self.part + v * lanes, lanes)
        for term, (kw, row, quad) in enumerate(plan.terms):
            if row == r:
                column = x * conv.stride[1] + kw * conv.dilation[1]
                activations = load(self.scratch, (column * (4 * plan.quads) + 4 * quad + v) * self.width, self.width)
                weights = load(self.scratch, plan.weights_at + (4 * term + v) * self.width, self.width)
                total = dot_quads(total, activations, tirx.reinterpret(f"int8x{self.width}", weights), self.width)
        assert self.buffers.multiplier is not None
        multiplier = load(self.buffers.multiplier, self.part + v * lanes, lanes)
        return round_lanes(rounded_product(cast(total, "float32", lanes), multiplier, lanes), self.width)
