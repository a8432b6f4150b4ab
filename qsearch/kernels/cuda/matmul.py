"""Batches of strided matrix products: tiles in shared memory, some rows and columns of a tile per thread in registers.

Zero points are taken off while tiles are filled, so that what lies outside an operand is zero and adds nothing. Integer sums
are exact in int32, float32 sums are fused multiply-adds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cuda.epilogue import Arguments, finished, held
from qsearch.kernels.cuda.matmul_plan import MatmulPlan, matmul_kernel
from qsearch.kernels.cuda.simt import constant, converted, fma, grid, load, mul, registers, shared, store, sync
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["matmul"]

# Threads of a block along rows and columns, and steps of the contraction in a tile.
SIDE, DEPTH = 16, 16
# Rows, or columns, of a thread.
WIDTHS = (4, 2, 1)
# Blocks that keep a large GPU busy.
ENOUGH_BLOCKS = 132


def matmul(key: OpKey, arch: str) -> Kernel | None:
    """Describe a batch of products; None for another operation.

    Args:
        key: kind 'matmul', precision 'int8' (uint8 operands), 'fp32' or 'fp16', shapes (a, b, out), strides in `matmul`.
        arch: Architecture.
    """
    if key.kind != "matmul":
        return None
    return matmul_kernel(key, partial(_Product, _Plan(key)))


@dataclass(frozen=True)
class _Plan(MatmulPlan):
    """Static numbers of one kernel."""

    @cached_property
    def widths(self) -> tuple[int, int]:
        """(rows, columns) of a thread: as little work as can be, what lies outside included."""
        return min(((rows, columns) for rows in WIDTHS for columns in WIDTHS), key=self._cost)

    def _cost(self, widths: tuple[int, int]) -> float:
        """Loads from shared memory and multiplications, divided by how many blocks share them."""
        rows, columns = widths
        blocks = self.batch * math.prod(self._tiles(widths))
        return (rows + columns + rows * columns) * max(blocks, ENOUGH_BLOCKS)

    def _tiles(self, widths: tuple[int, int]) -> tuple[int, int]:
        m, n, _ = self.extents
        return -(-m // (SIDE * widths[0])), -(-n // (SIDE * widths[1]))

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles along rows and columns."""
        return self._tiles(self.widths)


@dataclass(frozen=True)
class _Operand:
    """One operand of one block's tile.

    Attributes:
        source: Its memory.
        which: 'a' or 'b'.
        start: Index of the product's first element.
        strides: Of the axis that is not contracted, then of the contraction.
        first: First row or column of the tile.
        extent: Rows or columns.
        width: Of them a thread's.
        tile: By step, then row or column; one element further apart than they are long.
    """

    source: tirx.Buffer
    which: str
    start: Expr
    strides: tuple[int, int]
    first: Expr
    extent: int
    width: int
    tile: tirx.Buffer

    @property
    def line(self) -> int:
        """Elements of the tile from one step to the next."""
        return SIDE * self.width + 1


@dataclass(frozen=True)
class _Product:
    """The kernel's arguments, and its statements."""

    plan: _Plan
    a: tirx.Buffer
    b: tirx.Buffer
    arguments: Arguments
    output: tirx.Buffer

    def write(self) -> None:
        """Launch a block per tile of a product."""
        plan, (down, across) = self.plan, self.plan.tiles
        matmul, (m, n, k), (rows, columns) = plan.key.matmul, plan.extents, plan.widths
        with grid(plan.batch * down * across, SIDE * SIDE) as (block, thread):
            product = block // (down * across)
            row, column = block // across % down * (SIDE * rows), block % across * (SIDE * columns)
            tiles = [shared(DEPTH * (SIDE * width + 1), plan.total) for width in plan.widths]
            at = [plan.offset(strides, product) for strides in (matmul.a, matmul.b, matmul.out)]
            left = _Operand(self.a, "a", at[0], (matmul.a[-2], matmul.a[-1]), row, m, rows, tiles[0])
            right = _Operand(self.b, "b", at[1], (matmul.b[-1], matmul.b[-2]), column, n, columns, tiles[1])
            totals = registers(rows * columns, plan.total)
            for i in range(rows * columns):
                store(totals, i, constant(0, plan.total))
            with T.serial(0, -(-k // DEPTH)) as step:
                for operand in (left, right):
                    self._fill(operand, thread, step * DEPTH)
                sync()
                for depth in range(DEPTH):
                    self._multiply(totals, left, right, thread, depth)
                sync()
            self._store(totals, at[2], row + thread // SIDE, column + thread % SIDE)

    def _fill(self, operand: _Operand, thread: Expr, step: Expr) -> None:
        """Load a tile; adjacent threads take what is adjacent in memory where either axis is."""
        lines, k, dtype = SIDE * operand.width, self.plan.extents[2], self.plan.total
        for i in range(operand.width):
            element = thread + i * SIDE * SIDE
            if operand.strides[1] == 1 or operand.strides[0] != 1:
                depth, line = element % DEPTH, element // DEPTH
            else:
                depth, line = element // lines, element % lines
            place, at = operand.first + line, step + depth
            value = converted(load(operand.source, operand.start + place * operand.strides[0] + at * operand.strides[1]), dtype)
            if dtype == "int32":
                value = value - self.arguments.integer(f"{operand.which}_zero_point")
            inside = [place < operand.extent] if operand.extent % lines else []
            inside += [at < k] if k % DEPTH else []
            if inside:
                value = tirx.if_then_else(tirx.all(*inside), value, constant(0, dtype))
            store(operand.tile, depth * operand.line + line, value)

    def _multiply(self, totals: tirx.Buffer, left: _Operand, right: _Operand, thread: Expr, depth: int) -> None:
        """Add one step's products of a thread's rows and columns."""
        held = []
        for operand, lane in ((left, thread // SIDE), (right, thread % SIDE)):
            values = registers(operand.width, self.plan.total)
            for i in range(operand.width):
                store(values, i, load(operand.tile, depth * operand.line + i * SIDE + lane))
            held.append(values)
        for i in range(left.width):
            for j in range(right.width):
                a, b, place = load(held[0], i), load(held[1], j), i * right.width + j
                total = load(totals, place)
                store(totals, place, total + a * b if self.plan.total == "int32" else fma(a, b, total))

    def _store(self, totals: tirx.Buffer, start: Expr, row: Expr, column: Expr) -> None:
        """Requantize and store what a thread has summed."""
        key, (m, n, _), (rows, columns) = self.plan.key, self.plan.extents, self.plan.widths
        (down, across), arguments = key.matmul.out[-2:], held(self.arguments)
        for i in range(rows):
            for j in range(columns):
                place = row + i * SIDE, column + j * SIDE
                with T.If(tirx.all(place[0] < m, place[1] < n)), T.Then():
                    value = mul(converted(load(totals, i * columns + j), "float32"), arguments.float("multiplier"))
                    value = finished(key.dtypes[-1], value, arguments, key.clipped)
                    store(self.output, start + place[0] * down + place[1] * across, value)
