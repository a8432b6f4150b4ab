"""Batches of strided matrix products on the matrix units: bytes, or float16 with float32 sums.

A block brings a tile of each operand into shared memory, its contraction innermost, and its four warps multiply quarters. Bytes
are multiplied without their zero points, and with ones, which gives the sums of rows and columns:

    sum (a - a_zp) (b - b_zp) = sum a b - b_zp sum a - a_zp sum b + k a_zp b_zp

What lies outside an operand is zero and adds to none of these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cuda.device import perform
from qsearch.kernels.cuda.epilogue import Arguments, finished, held
from qsearch.kernels.cuda.matmul_fill import Operand, fill
from qsearch.kernels.cuda.matmul_plan import MatmulPlan, matmul_kernel
from qsearch.kernels.cuda.simt import at, constant, converted, grid, load, mul, registers, store, sync
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["matmul_tensor"]

# Bytes of a step of the matrix units, and of the most that a tile holds of the contraction.
STEP, MOST_DEPTH = 32, 64
WARPS = (2, 2)
THREADS = 128
# Blocks that keep a large GPU busy.
ENOUGH_BLOCKS = 264
MULTIPLY = {"uint8": "qs_mma_u8u8", "float16": "qs_mma_f16"}
ONES = 0x01010101


def matmul_tensor(key: OpKey, arch: str) -> Kernel | None:
    """Describe a batch of products of bytes or of float16; None for another operation.

    Args:
        key: kind 'matmul', shapes (a, b, out), strides in `matmul`.
        arch: Architecture.
    """
    if key.kind != "matmul" or key.dtypes[0] not in MULTIPLY or key.dtypes[1] != key.dtypes[0]:
        return None
    return matmul_kernel(key, partial(_Product, _Plan(key)))


@dataclass(frozen=True)
class _Plan(MatmulPlan):
    """Static numbers of one kernel."""

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return 1 if self.key.dtypes[0] == "uint8" else 2

    @property
    def depth(self) -> int:
        """Elements of the contraction in a tile."""
        return min(MOST_DEPTH, -(-self.extents[2] * self.itemsize // STEP) * STEP) // self.itemsize

    @cached_property
    def tile(self) -> tuple[int, int]:
        """(rows, columns) of a block: as little work as can be, what lies outside included."""
        return min(((rows, columns) for rows in (64, 32) for columns in (64, 32)), key=self._cost)

    def _cost(self, tile: tuple[int, int]) -> float:
        """What is brought in and multiplied, divided by how many blocks share it."""
        blocks = self.batch * math.prod(self._tiles(tile))
        return (4 * sum(tile) + math.prod(tile) / 16) * max(blocks, ENOUGH_BLOCKS)

    def _tiles(self, tile: tuple[int, int]) -> tuple[int, int]:
        return -(-self.extents[0] // tile[0]), -(-self.extents[1] // tile[1])

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles along rows and columns."""
        return self._tiles(self.tile)


@dataclass(frozen=True)
class _Sums:
    """A thread's part of the fragments, four sums each; rows l / 4 and l / 4 + 8, columns l % 4 * 2 and the next of lane l.

    Attributes:
        products: By block of 16 rows, then of 8 columns.
        rows: Sums of a's rows, by block of 16; None for float.
        columns: Sums of b's columns, by block of 8; None for float.
    """

    products: tirx.Buffer
    rows: tirx.Buffer | None
    columns: tirx.Buffer | None


@dataclass(frozen=True)
class _Product:
    """The kernel's arguments, and its statements."""

    plan: _Plan
    a: tirx.Buffer
    b: tirx.Buffer
    arguments: Arguments
    output: tirx.Buffer

    @property
    def integer(self) -> bool:
        """True for bytes."""
        return self.plan.total == "int32"

    @property
    def blocks(self) -> tuple[int, int]:
        """Fragments of a warp along rows and columns."""
        return self.plan.tile[0] // WARPS[0] // 16, self.plan.tile[1] // WARPS[1] // 8

    def write(self) -> None:
        """Launch a block per tile of a product."""
        plan, (down, across), matmul = self.plan, self.plan.tiles, self.plan.key.matmul
        (m, n, k), (rows, columns), depth = plan.extents, plan.tile, plan.depth
        with grid(plan.batch * down * across, THREADS) as (block, thread):
            product, row, column = block // (down * across), block // across % down * rows, block % across * columns
            starts = [plan.offset(strides, product) for strides in (matmul.a, matmul.b, matmul.out)]
            aligned = math.gcd(*matmul.a[:-1], k), math.gcd(*matmul.b[:-2], matmul.b[-1], k)
            left = Operand(self.a, starts[0], (matmul.a[-2], matmul.a[-1]), row, (m, k), (rows, depth), aligned[0])
            right = Operand(self.b, starts[1], (matmul.b[-1], matmul.b[-2]), column, (n, k), (columns, depth), aligned[1])
            sums = self._sums()
            tiles = [operand.tile() for operand in (left, right)]
            with T.serial(0, -(-k // depth)) as step:
                for operand, tile in zip((left, right), tiles, strict=True):
                    fill(operand, tile, thread, THREADS, step * depth)
                sync()
                for part in range(depth * plan.itemsize // STEP):
                    self._multiply(sums, [(left, tiles[0]), (right, tiles[1])], thread, part)
                sync()
            self._store(sums, starts[2], (row, column), thread)

    def _sums(self) -> _Sums:
        high, wide = self.blocks
        counts = (high * wide, high, wide) if self.integer else (high * wide,)
        found = []
        for count in counts:
            sums = registers(4 * count, self.plan.total)
            for i in range(4 * count):
                store(sums, i, constant(0, self.plan.total))
            found.append(sums)
        return _Sums(*found) if self.integer else _Sums(found[0], None, None)

    def _multiply(self, sums: _Sums, operands: list[tuple[Operand, tirx.Buffer]], thread: Expr, part: int) -> None:
        """Add 32 bytes of the contraction.

        Lane l points to row l % 16 of the left fragment's half l / 16, and of the right one's to row l % 8 of column block
        l / 16, half l / 8 % 2.
        """
        (high, wide), lane, warp, half = self.blocks, thread % 32, thread // 32, 16 // self.plan.itemsize
        left, right = registers(4 * high, "int32"), registers(2 * wide, "int32")
        (first, a), (second, b) = operands
        for i in range(high):
            row = warp // WARPS[1] * (16 * high) + i * 16 + lane % 16
            perform("qs_load_matrices_4", at(left, 4 * i), at(a, row * first.line + (2 * part + lane // 16) * half))
        for j in range(0, wide, 2):
            row = warp % WARPS[1] * (8 * wide) + j * 8 + lane // 16 * 8 + lane % 8
            perform("qs_load_matrices_4", at(right, 2 * j), at(b, row * second.line + (2 * part + lane // 8 % 2) * half))
        name = MULTIPLY[self.plan.key.dtypes[0]]
        for i in range(high):
            for j in range(wide):
                perform(name, at(sums.products, 4 * (i * wide + j)), at(left, 4 * i), at(right, 2 * j))
        if sums.rows is None or sums.columns is None:
            return
        ones = registers(4, "int32")
        for i in range(4):
            store(ones, i, constant(ONES, "int32"))
        for i in range(high):
            perform(name, at(sums.rows, 4 * i), at(left, 4 * i), at(ones, 0))
        for j in range(wide):
            perform(name, at(sums.columns, 4 * j), at(ones, 0), at(right, 2 * j))

    def _store(self, sums: _Sums, start: Expr, first: tuple[Expr, Expr], thread: Expr) -> None:
        """Requantize and store what a thread has summed."""
        key, (m, n, _), (high, wide) = self.plan.key, self.plan.extents, self.blocks
        lane, warp, (down, across), arguments = thread % 32, thread // 32, key.matmul.out[-2:], held(self.arguments)
        for i in range(high):
            for j in range(wide):
                for part in range(4):
                    row = first[0] + warp // WARPS[1] * (16 * high) + i * 16 + part // 2 * 8 + lane // 4
                    column = first[1] + warp % WARPS[1] * (8 * wide) + j * 8 + lane % 4 * 2 + part % 2
                    with T.If(tirx.all(row < m, column < n)), T.Then():
                        total = self._total(sums, arguments, (i, j, part))
                        value = mul(converted(total, "float32"), arguments.float("multiplier"))
                        value = finished(key.dtypes[-1], value, arguments, key.clipped)
                        store(self.output, start + row * down + column * across, value)

    def _total(self, sums: _Sums, arguments: Arguments, which: tuple[int, int, int]) -> Expr:
        """One of the four sums of a fragment, zero points taken off."""
        i, j, part = which
        total = load(sums.products, 4 * (i * self.blocks[1] + j) + part)
        if sums.rows is None or sums.columns is None:
            return total
        a, b = (arguments.integer(f"{operand}_zero_point") for operand in "ab")
        taken = b * load(sums.rows, 4 * i + part) + a * load(sums.columns, 4 * j + part)
        return total - taken + self.plan.extents[2] * a * b
