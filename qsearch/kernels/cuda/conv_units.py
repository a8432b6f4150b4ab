"""What multiplies a step's tiles: the matrix units, or ordinary instructions. Both keep their sums in registers."""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr

from qsearch.kernels.cuda.conv_layout import UNIT_WORDS, Place, kept, swizzle_of, xor
from qsearch.kernels.cuda.conv_plan import ConvPlan
from qsearch.kernels.cuda.device import perform
from qsearch.kernels.cuda.simt import at, constant, load, move, registers, store

__all__ = ["MatrixUnits"]

_MULTIPLY = {"uint8": "qs_mma_u8s8", "float16": "qs_mma_f16"}


class MatrixUnits:
    """A warp's tile as fragments of 16 x 8 sums; a step of theirs covers 32 bytes of the contraction.

    Args:
        plan: The kernel.
        place: The thread.
    """

    def __init__(self, plan: ConvPlan, place: Place) -> None:
        self.plan, tile = plan, plan.tile
        self.high, self.wide = tile.warp_rows // 16, tile.warp_columns // 8
        self.sums = registers(4 * self.high * self.wide, plan.dtypes[2])
        for i in range(4 * self.high * self.wide):
            store(self.sums, i, constant(0, plan.dtypes[2]))
        lane = kept(place.lane)
        row, column, self.depth = (kept(x) if not isinstance(x, int) else x for x in place.warp(tile.warps))
        self.row, self.column, self.lane = row * tile.warp_rows, column * tile.warp_columns, lane
        units = tile.depth // 16
        start = self.depth * (2 * tile.warp_steps)
        # Lane l points to row l % 16 of the left fragment's half l / 16; of the right one to row l % 8 of column block
        # l / 16, half l / 8 % 2.
        left, right = lane % 16, lane // 16 * 8 + lane % 8
        self.left = kept((self.row + left) * (tile.depth // 4))
        self.left_unit = kept(xor(xor(lane // 16, swizzle_of(left, units)), start))
        self.right = kept((self.column + right) * (tile.depth // 4))
        self.right_unit = kept(xor(xor(lane // 8 % 2, swizzle_of(right, units)), start))

    def multiply(self, shared: tirx.Buffer, source: Expr | int, weight: Expr | int) -> None:
        """Add a step's products: its pixels lie in words `source` onwards, its weights in words `weight` onwards."""
        row_words = self.plan.tile.depth // 4
        left, right = registers(4 * self.high, "int32"), registers(2 * self.wide, "int32")
        for step in range(self.plan.tile.warp_steps):
            for i in range(self.high):
                word = source + self.left + i * 16 * row_words + xor(self.left_unit, 2 * step) * UNIT_WORDS
                perform("qs_load_matrices_4", at(left, 4 * i), at(shared, word))
            for j in range(self.wide // 2):
                word = weight + self.right + j * 16 * row_words + xor(self.right_unit, 2 * step) * UNIT_WORDS
                perform("qs_load_matrices_4", at(right, 4 * j), at(shared, word))
            for i in range(self.high):
                for j in range(self.wide):
                    name = _MULTIPLY[self.plan.dtypes[0]]
                    perform(name, at(self.sums, 4 * (i * self.wide + j)), at(left, 4 * i), at(right, 2 * j))

    def stage(self, shared: tirx.Buffer, first: int, rows: int) -> None:
        """Write the sums of 16-row blocks first .. first + rows - 1 of every warp to shared memory.

        Sums of warps that share depth lie apart; rows follow one another by warp, block and row.
        """
        tile = self.plan.tile
        warps, across = tile.warps, tile.staged_row
        apart = self.depth * (warps[0] * rows * 16 * across)
        row = self.row // tile.warp_rows * (rows * 16) if warps[0] > 1 else 0
        base = kept(apart + (row + self.lane // 4) * across + self.column + self.lane % 4 * 2)
        for i in range(rows):
            for j in range(self.wide):
                for half in range(2):
                    place = base + (i * 16 + half * 8) * across + j * 8
                    move(shared, place, self.sums, 4 * ((first + i) * self.wide + j) + 2 * half, 2)


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
