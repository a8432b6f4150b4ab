"""Depthwise convolution of bytes by dots: four kernel rows in one instruction.

A thread computes four adjacent channels of a tile of output rows and columns. Of every input column it loads a word, four
channels, from each of the rows that the tile needs, and turns four such words so that a word holds four rows of one channel;
one dot with four weights, zero where an output row does not reach, then does four products. Output rows that follow one
another share what was turned.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cuda.depthwise_quads_plan import QuadsPlan
from qsearch.kernels.cuda.device import call
from qsearch.kernels.cuda.layer import LayerBuffers, LayerEnd, declare_layer, pack_layer
from qsearch.kernels.cuda.simt import at, constant, kernel, load, registers, store
from qsearch.kernels.cuda.vectors import fetched, items
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["depthwise_quads"]

# Channels of a word.
LANES = 4
# Of two words, bytes 0 and 1 or 2 and 3 of each in turns; and the first or second halves of each.
LOW_TURNS, HIGH_TURNS, FIRST_HALVES, SECOND_HALVES = 0x5140, 0x7362, 0x5410, 0x7632


def depthwise_quads(key: OpKey, arch: str) -> Kernel | None:
    """Describe the kernel of a depthwise convolution that reads bytes, or None for another operation.

    Args:
        key: kind 'conv2d' with groups = input channels = output channels, a multiple of four.
        arch: Architecture.
    """
    channels = key.shapes[0][-1]
    if key.kind != "conv2d" or key.dtypes[0] != "uint8" or key.conv.groups == 1 or channels % LANES:
        return None
    if key.conv.groups != channels or key.shapes[-1][3] != channels:
        return None
    plan = QuadsPlan(key)

    def generate(symbol: str) -> tirx.PrimFunc:
        return kernel(symbol, lambda: _write(plan))

    return Kernel(key, (), generate, lambda constants: pack_layer(key, constants), 0, plan.pack_weight)


def _write(plan: QuadsPlan) -> None:
    buffers = declare_layer(plan.key, len(plan.terms) * plan.channels, "int32")
    groups, (down, across) = plan.channels // LANES, plan.tiles
    with items(plan.threads) as item:
        tile = item // groups
        image, y, x = tile // across // down, tile // across % down * plan.rows, tile % across * plan.columns
        _Tile(plan, buffers, item % groups * LANES, image, y, x).write()


@dataclass(frozen=True)
class _Tile:
    """What one thread computes.

    Attributes:
        plan: Static numbers.
        buffers: The kernel's arguments.
        channel: First channel.
        image: Which image.
        y: First output row.
        x: First output column.
    """

    plan: QuadsPlan
    buffers: LayerBuffers
    channel: Expr
    image: Expr
    y: Expr
    x: Expr

    def write(self) -> None:
        """Sum quad by quad and column by column, then store."""
        plan = self.plan
        totals, bias = (
            registers(plan.rows * plan.columns * LANES, "int32"),
            fetched(self.buffers.channel["bias"], self.channel, LANES),
        )
        for i in range(plan.rows * plan.columns * LANES):
            store(totals, i, load(bias, i % LANES))
        fill = registers(1, "int32")
        store(fill, 0, self.buffers.arguments.integer("a_zero_point") * constant(0x01010101, "int32"))
        for quad in range(plan.quads):
            weights = {
                term: fetched(self.buffers.weight, i * plan.channels + self.channel, LANES)
                for i, term in enumerate(plan.terms)
                if term[0] == quad
            }
            for column, uses in plan.reads:
                turned = self._turned(quad, column, load(fill, 0))
                for j, kw in uses:
                    for row in plan.rows_of(quad):
                        self._add(totals, (row * plan.columns + j) * LANES, turned, weights[quad, kw, row])
        self._store(totals)

    def _add(self, totals: tirx.Buffer, first: int, turned: tirx.Buffer, weights: tirx.Buffer) -> None:
        for lane in range(LANES):
            total = call("qs_dot_bytes", load(totals, first + lane), load(turned, lane), load(weights, lane))
            store(totals, first + lane, total)

    def _turned(self, quad: int, column: int, fill: Expr) -> tirx.Buffer:
        """Four rows of one input column, a word for each channel."""
        rows, words = self.plan.slots[4 * quad : 4 * quad + 4], registers(4, "int32")
        for i in range(4):
            store(words, i, self._word(rows[i], column, fill) if i < len(rows) else constant(0, "int32"))
        halves, turned = registers(4, "int32"), registers(LANES, "int32")
        for i, (pair, chosen) in enumerate(((0, LOW_TURNS), (2, LOW_TURNS), (0, HIGH_TURNS), (2, HIGH_TURNS))):
            store(halves, i, _permuted(load(words, pair), load(words, pair + 1), chosen))
        for lane in range(LANES):
            chosen = SECOND_HALVES if lane % 2 else FIRST_HALVES
            store(turned, lane, _permuted(load(halves, lane // 2 * 2), load(halves, lane // 2 * 2 + 1), chosen))
        return turned

    def _word(self, row: int, column: int, fill: Expr) -> Expr:
        """Four channels of one input position, relative to the tile's first tap; zero points where it is padding."""
        conv, (_, height, width, channels) = self.plan.key.conv, self.plan.key.shapes[0]
        y, x = self.y * conv.stride[0] + (row - conv.padding[0]), self.x * conv.stride[1] + (column - conv.padding[1])
        index = ((self.image * height + y) * width + x) * channels + self.channel
        value = call("qs_word", at(self.buffers.source, index))
        conditions = self.plan.conditions(y, row, 0) + self.plan.conditions(x, column, 1)
        return tirx.if_then_else(tirx.all(*conditions), value, fill) if conditions else value

    def _store(self, totals: tirx.Buffer) -> None:
        """Store what of the tile lies in the output."""
        plan, (_, height, width, channels) = self.plan, self.plan.key.shapes[-1]
        end = LayerEnd(plan.key, self.buffers, self.channel, LANES)
        for row in range(plan.rows):
            for j in range(plan.columns):
                index = ((self.image * height + self.y + row) * width + self.x + j) * channels + self.channel
                conditions = [self.y + row < height] if row and height % plan.rows else []
                conditions += [self.x + j < width] if j and width % plan.columns else []
                if conditions:
                    with T.If(tirx.all(*conditions)), T.Then():
                        end.write(totals, (row * plan.columns + j) * LANES, index)
                else:
                    end.write(totals, (row * plan.columns + j) * LANES, index)


def _permuted(a: Expr, b: Expr, chosen: int) -> Expr:
    return call("qs_permute", a, b, constant(chosen, "int32"))
