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

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cpu.buffers import LayerBuffers, clipped_per_channel, declare_layer
from qsearch.kernels.cpu.byte_vectors import dot_quads, interleave, narrow_to_bytes, narrow_to_words, round_lanes
from qsearch.kernels.cpu.depthwise_plan import WIDTHS, QuadsPlan
from qsearch.kernels.cpu.isa import Isa
from qsearch.kernels.cpu.vectors import cast, constant, kernel, load, loop, registers, rounded_product, splat, store
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["depthwise_quads"]


def depthwise_quads(key: OpKey, isa: Isa, threads: int) -> Kernel | None:
    """Describe the kernel of an int8 or w4a8 depthwise convolution from uint8 to uint8, or None for another operation.

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
    plan = QuadsPlan(key, threads)
    return Kernel(
        key,
        (isa.name, "quads", plan.rows),
        lambda symbol: kernel(symbol, lambda: _generate(plan)),
        plan.pack,
        plan.scratch_bytes * plan.shared,
        plan.pack_weight,
    )


def _generate(plan: QuadsPlan) -> None:
    images, height, width, channels = plan.key.shapes[0]
    _, out_height, out_width, _ = plan.key.shapes[-1]
    packed = sum(block[1] for block in plan.blocks)
    buffers = declare_layer(plan.key, packed * len(plan.terms) * 4, packed, align=16)
    tiles = -(-out_height // plan.rows)
    with loop(images * tiles, plan.shared) as i:
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
        scratch: The quads, by input column, quad and vector; then the block's weights and the tile's results.
        width: Channels of the block.
        part: Channels packed before it.
        y: First output row.
    """

    plan: QuadsPlan
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
        value = rounded_product(cast(total, "float32", lanes), multiplier, lanes)
        return round_lanes(clipped_per_channel(self.buffers, value, self.part + v * lanes, lanes), self.width)
