"""What multiplies a step's tiles: the matrix units, or ordinary instructions. Both keep their sums in registers."""

from __future__ import annotations

from typing import Protocol

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cuda.conv_layout import UNIT_WORDS, Place, kept, swizzle, swizzle_of, xor
from qsearch.kernels.cuda.conv_plan import ConvPlan
from qsearch.kernels.cuda.device import perform
from qsearch.kernels.cuda.simt import at, constant, load, move, registers, store

__all__ = ["MatrixUnits", "ScalarUnits", "Units", "staged_sum"]

# Input dtype -> device function.
_MULTIPLY = {
    "uint8": "qs_mma_u8s8",
    "float8_e4m3fn": "qs_mma_e4m3",
    "float16": "qs_mma_f16",
    "float32": "qs_mma_tf32",
}
_DOT = {"float32": "qs_dot_f32", "int16": "qs_dot_s16"}


# Shared memory from one of its words on.
Words = tuple[tirx.Buffer, Expr | int]


class Units(Protocol):
    """What multiplies, and keeps the sums."""

    def multiply(self, source: Words, weight: Words) -> None:
        """Add a step's products.

        Args:
            source: The step's pixels.
            weight: Its weights.
        """

    def stage(self, shared: tirx.Buffer, first: int, blocks: int) -> None:
        """Write the sums of 16-row blocks first .. first + blocks - 1 of every warp to shared memory.

        Sums of warps that share the depth lie apart; rows follow one another by warp, block and row.
        """


class _Warp:
    """Where a thread's warp stands in the tile."""

    def __init__(self, plan: ConvPlan, place: Place) -> None:
        self.plan, self.lane = plan, kept(place.lane)
        warp = place.warp(plan.tile.warps)
        self.row, self.column, self.depth = (kept(x) if not isinstance(x, int) else x for x in warp)
        # Of its depth, in units: exclusive or adds it, the unit within the warp's steps being less.
        self.unit = self.depth * (2 * plan.tile.warp_steps)
        packed = place.group * plan.packed_columns + place.column_tile * plan.tile.columns
        self.channel = kept(packed + self.column * plan.tile.warp_columns)

    def start(self, bias: tirx.Buffer, column: Expr, lanes: int) -> list[Expr]:
        """What the sums of adjacent columns of the warp's tile start at: of warps that share the depth one has the bias."""
        dtype = self.plan.dtypes[2]
        if self.plan.bias_last:
            return [constant(0, dtype)] * lanes
        values = registers(lanes, dtype)
        move(values, 0, bias, self.channel + column, lanes)
        starts = [load(values, i) for i in range(lanes)]
        if isinstance(self.depth, int):
            return starts
        return [tirx.Select(self.depth == 0, value, constant(0, dtype)) for value in starts]

    def staged(self, row: Expr, column: Expr, blocks: int) -> Expr:
        """The word of a row and column of the warp's tile, of which `blocks` blocks of 16 rows are staged."""
        tile = self.plan.tile
        height = blocks * 16
        rows = self.depth * (tile.warps[0] * height) + self.row * height + row
        return kept(rows * tile.staged_row + self.column * tile.warp_columns + column)


class MatrixUnits:
    """A warp's tile as fragments of 16 x 8 sums; a step of theirs covers 32 bytes of the contraction.

    Args:
        plan: The kernel.
        place: The thread.
        bias: What sums start at.
    """

    def __init__(self, plan: ConvPlan, place: Place, bias: tirx.Buffer) -> None:
        self.plan, self.warp, tile = plan, _Warp(plan, place), plan.tile
        self.high, self.wide = tile.warp_rows // 16, tile.warp_columns // 8
        self.sums = registers(4 * self.high * self.wide, plan.dtypes[2])
        lane, units = self.warp.lane, tile.depth // 16
        for j in range(self.wide):
            # Lane l has columns 2 (l % 4) and the next of rows l / 4 and l / 4 + 8.
            starts = self.warp.start(bias, j * 8 + lane % 4 * 2, 2)
            for i in range(4 * self.high):
                store(self.sums, 4 * (i // 4 * self.wide + j) + i % 4, starts[i % 2])
        # Lane l points to row l % 16 of the left fragment's half l / 16; of the right one to row l % 8 of column block
        # l / 16, half l / 8 % 2.
        left, right = lane % 16, lane // 16 * 8 + lane % 8
        self.left = kept((self.warp.row * tile.warp_rows + left) * (tile.depth // 4))
        self.left_unit = kept(xor(xor(lane // 16, swizzle_of(left, units)), self.warp.unit))
        self.right = kept((self.warp.column * tile.warp_columns + right) * (tile.depth // 4))
        self.right_unit = kept(xor(xor(lane // 8 % 2, swizzle_of(right, units)), self.warp.unit))

    def multiply(self, source: Words, weight: Words) -> None:
        """See `Units`."""
        row_words = self.plan.tile.depth // 4
        left, right = registers(4 * self.high, "int32"), registers(2 * self.wide, "int32")
        name = _MULTIPLY[self.plan.dtypes[0]]
        for step in range(self.plan.tile.warp_steps):
            for i in range(self.high):
                word = source[1] + self.left + i * 16 * row_words + xor(self.left_unit, 2 * step) * UNIT_WORDS
                perform("qs_load_matrices_4", at(left, 4 * i), at(source[0], word))
            for j in range(self.wide // 2):
                word = weight[1] + self.right + j * 16 * row_words + xor(self.right_unit, 2 * step) * UNIT_WORDS
                perform("qs_load_matrices_4", at(right, 4 * j), at(weight[0], word))
            for i in range(self.high):
                for j in range(self.wide):
                    perform(name, at(self.sums, 4 * (i * self.wide + j)), at(left, 4 * i), at(right, 2 * j))

    def stage(self, shared: tirx.Buffer, first: int, blocks: int) -> None:
        """See `Units`."""
        base = self.warp.staged(self.warp.lane // 4, self.warp.lane % 4 * 2, blocks)
        for i in range(blocks):
            for j in range(self.wide):
                for half in range(2):
                    place = base + (i * 16 + half * 8) * self.plan.tile.staged_row + j * 8
                    move(shared, place, self.sums, 4 * ((first + i) * self.wide + j) + 2 * half, 2)


class ScalarUnits:
    """Ordinary instructions: the lanes of a warp are 4 x 8, and have every fourth row and every eighth column of its tile.

    They read units of 16 bytes along the contraction; eight columns that follow one another lie in different banks.

    Args:
        plan: The kernel.
        place: The thread.
        bias: What sums start at.
    """

    def __init__(self, plan: ConvPlan, place: Place, bias: tirx.Buffer) -> None:
        self.plan, self.warp, tile = plan, _Warp(plan, place), plan.tile
        self.high, self.wide = tile.warp_rows // 4, tile.warp_columns // 8
        self.sums = registers(self.high * self.wide, plan.dtypes[2])
        self.units = tile.depth // 16
        self.lane_row, self.lane_column = kept(self.warp.lane // 8), kept(self.warp.lane % 8)
        for j in range(self.wide):
            (start,) = self.warp.start(bias, self.lane_column + j * 8, 1)
            for i in range(self.high):
                store(self.sums, i * self.wide + j, start)
        self.left = kept((self.warp.row * tile.warp_rows + self.lane_row) * (tile.depth // 4))
        self.left_unit = kept(xor(swizzle_of(self.lane_row, self.units), self.warp.unit))
        self.right = kept((self.warp.column * tile.warp_columns + self.lane_column) * (tile.depth // 4))
        self.right_unit = kept(xor(swizzle_of(self.lane_column, self.units), self.warp.unit))

    def multiply(self, source: Words, weight: Words) -> None:
        """See `Units`."""
        with T.serial(0, 2 * self.plan.tile.warp_steps) as unit:
            self._unit(source, weight, unit)

    def _unit(self, source: Words, weight: Words, unit: Expr) -> None:
        row_words = self.plan.tile.depth // 4
        left, right = (registers(UNIT_WORDS * count, self.plan.dtypes[2]) for count in (self.high, self.wide))
        for i in range(self.high):
            # Rows 4 to 7 of eight are swizzled differently from rows 0 to 3.
            place = xor(xor(self.left_unit, unit), swizzle(i % 2 * 4, self.units)) * UNIT_WORDS
            move(left, UNIT_WORDS * i, source[0], source[1] + self.left + i * 4 * row_words + place, UNIT_WORDS)
        for j in range(self.wide):
            place = xor(self.right_unit, unit) * UNIT_WORDS
            move(right, UNIT_WORDS * j, weight[0], weight[1] + self.right + j * 8 * row_words + place, UNIT_WORDS)
        for i in range(self.high):
            for j in range(self.wide):
                sum_at, factors = at(self.sums, i * self.wide + j), (at(left, UNIT_WORDS * i), at(right, UNIT_WORDS * j))
                perform(_DOT[self.plan.dtypes[0]], sum_at, *factors)

    def stage(self, shared: tirx.Buffer, first: int, blocks: int) -> None:
        """See `Units`."""
        base = self.warp.staged(self.lane_row, self.lane_column, blocks)
        for i in range(4 * blocks):
            for j in range(self.wide):
                value = load(self.sums, (4 * first + i) * self.wide + j)
                store(shared, base + i * 4 * self.plan.tile.staged_row + j * 8, value)


def staged_sum(shared: tirx.Buffer, word: Expr, apart: int, copies: int, lanes: int, dtype: str) -> tirx.Buffer:
    """Adjacent sums, those of all warps that shared the depth added."""
    total = registers(lanes, dtype)
    move(total, 0, shared, word, lanes)
    for copy in range(1, copies):
        more = registers(lanes, dtype)
        move(more, 0, shared, word + copy * apart, lanes)
        for i in range(lanes):
            store(total, i, load(total, i) + load(more, i))
    return total
