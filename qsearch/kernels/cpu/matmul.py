"""Batches of strided matrix products: register tiles over a packed second operand.

For every product of the batch, b is packed into scratch memory as vectors of columns, by steps of the
contraction as a dot instruction takes them; tiles of rows of a times vectors of columns then stay in registers
over the whole contraction. The last vector of columns overlaps its neighbour.

uint8 products use the uint8 x int8 dot: b is held as b - 128, and with b' = b - 128, z' = b_zp - 128

    sum (a - a_zp) (b - b_zp) = sum a b' - a_zp sum b' - z' sum a + k a_zp z'

exactly, because every sum on the way fits int32. Sums of b' come from packing; sums of a are one more dot per row
and step, with ones. An instruction set whose dot takes a less an offset gets that back where its sums start.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cpu.epilogue import Arguments, declare_arguments, finish
from qsearch.kernels.cpu.isa import Isa
from qsearch.kernels.cpu.matmul_pack import pack_columns
from qsearch.kernels.cpu.matmul_plan import MatmulPlan
from qsearch.kernels.cpu.vectors import cast, constant, kernel, load, loop, narrow, registers, rounded_product, splat
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["matmul"]

# Fewer multiplications than this are not shared between threads.
LEAST_SHARED_PRODUCTS = 1 << 20


def matmul(key: OpKey, isa: Isa, threads: int) -> Kernel | None:
    """Describe a batch of products; None for another operation.

    Args:
        key: kind 'matmul', precision 'int8' (uint8 operands) or 'fp32', shapes (a, b, out), strides in `matmul`.
        isa: Instruction set.
        threads: Threads to share the batch between.
    """
    if key.kind != "matmul":
        return None
    plan = MatmulPlan(key, isa)
    shared = threads if plan.work > LEAST_SHARED_PRODUCTS and plan.batch > 1 else 1
    variant = (isa.name, plan.column_chunks, plan.row_tiles, shared)

    def pack(constants: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        return constants["integers"], constants["floats"]

    return Kernel(key, variant, lambda symbol: kernel(symbol, lambda: _write(plan, shared)), pack, shared * plan.scratch_bytes)


def _write(plan: MatmulPlan, threads: int) -> None:
    sizes = [int(np.prod(shape)) for shape in plan.key.shapes]
    a, b = (T.arg(name, T.Buffer((sizes[i],), plan.key.dtypes[i])) for i, name in enumerate("ab"))
    arguments = declare_arguments()
    output = T.arg("output", T.Buffer((sizes[2],), plan.key.dtypes[2]))
    with loop(plan.batch, threads) as i:
        dtype = "int8" if plan.integer else "float32"
        panel = T.alloc_buffer((plan.panel_elements,), dtype, scope="global", layout=None, align=64)
        starts = None
        if plan.integer:
            starts = T.alloc_buffer((plan.columns * plan.isa.lanes,), "int32", scope="global", layout=None, align=64)
        pack_columns(plan, b, plan.offset(plan.key.matmul.b, i), panel, starts, arguments)
        _Product(plan, a, panel, starts, arguments, output).write(
            plan.offset(plan.key.matmul.a, i), plan.offset(plan.key.matmul.out, i)
        )


@dataclass(frozen=True)
class _Product:
    """Writes one product of the batch."""

    plan: MatmulPlan
    a: tirx.Buffer
    panel: tirx.Buffer
    starts: tirx.Buffer | None
    arguments: Arguments
    output: tirx.Buffer

    def write(self, a_base: Expr | int, out_base: Expr | int) -> None:
        """All tiles."""
        plan = self.plan
        for first_column, chunks, width in plan.column_chunks:
            with T.serial(0, chunks) as j:
                for first_row, tiles, height in plan.row_tiles[width]:
                    with T.serial(0, tiles) as i:
                        self._tile((first_row + i * height, height), (first_column + j * width, width), a_base, out_base)

    def _tile(self, rows: tuple[Expr, int], columns: tuple[Expr, int], a_base: Expr | int, out_base: Expr | int) -> None:
        plan, (row, height), (column, width) = self.plan, rows, columns
        kind = f"{'int32' if plan.integer else 'float32'}x{plan.isa.lanes}"
        accumulators = registers(height * width, kind)
        sums = registers(height, kind) if plan.integer else None
        for r in range(height):
            for c in range(width):
                start = constant(0.0, "float32", plan.isa.lanes)
                if self.starts is not None:
                    start = load(self.starts, (column + c) * plan.isa.lanes, plan.isa.lanes)
                T.buffer_store(accumulators, start, [r * width + c])
            if sums is not None:
                T.buffer_store(sums, constant(plan.isa.activation_offset * plan.group * plan.steps, "int32", plan.isa.lanes), [r])
        origin = a_base + row * plan.key.matmul.a[-2]
        whole, rest = divmod(plan.key.matmul.extents[-1], plan.group)

        def step(at: Expr | int, kept: int) -> None:
            operands = [self._activation(origin + r * plan.key.matmul.a[-2] + at * plan.group, kept) for r in range(height)]
            self._step(accumulators, sums, operands, (column * plan.steps + at) * plan.vector, width)

        with T.serial(0, whole) as s:
            step(s, plan.group)
        if rest:
            step(whole, rest)
        for r in range(height):
            for c in range(width):
                value = tirx.BufferLoad(accumulators, [r * width + c])
                row_sum = None if sums is None else tirx.BufferLoad(sums, [r])
                self._store(value, row_sum, out_base + (row + r) * plan.key.matmul.out[-2], column + c)

    def _activation(self, at: Expr, kept: int) -> Expr:
        """One step's elements of a row of a, zeros beyond the first `kept`."""
        group = self.plan.group
        if kept == group:
            value = load(self.a, at, group)
        else:
            parts = [load(self.a, at + i) for i in range(kept)] + [constant(0, self.a.dtype)] * (group - kept)
            value = tirx.Shuffle(parts, [tirx.const(i, "int32") for i in range(group)])
        return tirx.reinterpret("int32", value) if group > 1 else value

    def _step(self, accumulators: tirx.Buffer, sums: tirx.Buffer | None, operands: list[Expr], at: Expr, width: int) -> None:
        plan = self.plan
        vectors = [load(self.panel, at + c * (plan.steps * plan.vector), plan.vector) for c in range(width)]
        for r, operand in enumerate(operands):
            for c, vector in enumerate(vectors):
                current = tirx.BufferLoad(accumulators, [r * width + c])
                if plan.integer:
                    value = plan.isa.dot(current, operand, vector)
                else:
                    value = plan.isa.multiply_add(f"float32x{plan.isa.lanes}", current, splat(operand, plan.isa.lanes), vector)
                T.buffer_store(accumulators, value, [r * width + c])
            if sums is not None:
                ones = constant(1, "int8", plan.vector)
                T.buffer_store(sums, plan.isa.dot(tirx.BufferLoad(sums, [r]), operand, ones), [r])

    def _store(self, value: Expr, row_sum: Expr | None, base: Expr, column: Expr) -> None:
        """Requantize one vector of a row and store it at its columns."""
        plan, arguments = self.plan, self.arguments
        lanes, kept = plan.isa.lanes, min(plan.isa.lanes, plan.key.matmul.extents[-2])
        if row_sum is not None:
            shift = arguments.integer("b_zero_point") - tirx.const(128, "int32")
            value = cast(value - row_sum * splat(shift, lanes), "float32", lanes)
        value = rounded_product(value, splat(arguments.float("multiplier"), lanes), lanes)
        index = base + plan.first_column(column)
        finish(plan.isa, self.output, index, narrow(value, lanes, kept), kept, arguments, plan.key.clipped)
