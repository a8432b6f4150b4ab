"""Pack the second operand of a matmul while it runs: vectors of columns, by steps of the contraction."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cpu.epilogue import Arguments
from qsearch.kernels.cpu.matmul_plan import MatmulPlan
from qsearch.kernels.cpu.vectors import constant, load, registers, splat, store

__all__ = ["pack_columns"]


def pack_columns(
    plan: MatmulPlan, b: tirx.Buffer, base: Expr, panel: tirx.Buffer, starts: tirx.Buffer | None, arguments: Arguments
) -> None:
    """Write the panel, and for integers what each column's sum starts from.

    Args:
        plan: The kernel.
        b: The operand's memory.
        base: Where this product's b starts.
        panel: int8 or float32, [column vector][step][lane][element of the step], zero beyond the contraction.
        starts: int32, [column vector][lane]: k * a_zp * z' + (offset - a_zp) * sum b'; None for float32.
        arguments: The kernel's scalars.
    """
    k, lanes = plan.key.matmul.extents[-1], plan.isa.lanes
    whole, rest = divmod(k, plan.group)
    with T.serial(0, plan.columns) as column:
        origin = base + plan.first_column(column) * plan.key.matmul.b[-1]
        total = None
        if starts is not None:
            total = registers(1, f"int32x{lanes}")
            T.buffer_store(total, constant(0, "int32", lanes), [0])

        def put(s: Expr | int, value: Expr) -> None:
            store(panel, (column * plan.steps + s) * plan.vector, value, plan.vector)
            if total is not None:
                T.buffer_store(total, plan.isa.dot(tirx.BufferLoad(total, [0]), _ones(plan), value), [0])

        def step(s: Expr | int, kept: int) -> None:
            put(s, _step(plan, b, origin + s * (plan.group * plan.key.matmul.b[-2]), kept))

        done = _transposed(plan, b, origin, whole, put)
        with T.serial(0, whole - done) as s:
            step(done + s, plan.group)
        if rest:
            step(whole, rest)
        if starts is not None:
            zero_point, shift = arguments.integer("a_zero_point"), arguments.integer("b_zero_point") - tirx.const(128, "int32")
            corrected = tirx.BufferLoad(total, [0]) * splat(tirx.const(plan.isa.activation_offset, "int32") - zero_point, lanes)
            store(starts, column * lanes, splat(shift * tirx.const(k, "int32") * zero_point, lanes) + corrected, lanes)


def _transposed(plan: MatmulPlan, b: tirx.Buffer, origin: Expr, steps: int, put: Callable[[Expr | int, Expr], None]) -> int:
    """Pack steps whose elements lie side by side in memory (attention's keys); how many were packed."""
    if plan.key.matmul.b[-2] != 1 or plan.key.matmul.extents[-2] < plan.isa.lanes:
        return 0
    done, words = 0, plan.isa.lanes
    while words > 1:
        count = (steps - done) // words
        if count:
            with T.serial(0, count) as i:
                first = done + i * words
                for s, value in enumerate(_transpose(plan, b, origin + first * plan.group, words)):
                    put(first + s, _signed(plan, value))
            done += count * words
        words //= 2
    return done


def _transpose(plan: MatmulPlan, b: tirx.Buffer, at: Expr, words: int) -> list[Expr]:
    """`words` adjacent steps of a vector of columns, each column's lying side by side: as many vectors, one per step.

    The matrix (lanes, words) is read as one row of vectors; every perfect shuffle of that row moves one bit of the
    lane's number from the top of the index to its bottom.
    """
    lanes, stride = plan.isa.lanes, plan.key.matmul.b[-1]
    kind = f"{'int32' if plan.integer else 'float32'}x{lanes}"
    together = lanes // words
    vectors = []
    for v in range(words):
        parts = [load(b, at + (v * together + i) * stride, words * plan.group) for i in range(together)]
        joined = [tirx.const(i, "int32") for i in range(lanes * plan.group)]
        value = tirx.Shuffle(parts, joined) if together > 1 else parts[0]
        vectors.append(tirx.reinterpret(kind, value) if plan.integer else value)
    orders = [[tirx.const(first + i // 2 + i % 2 * lanes, "int32") for i in range(lanes)] for first in (0, lanes // 2)]
    for _ in range(lanes.bit_length() - 1):
        kept = registers(words, kind)
        for v, value in enumerate(vectors):
            T.buffer_store(kept, value, [v])
        pairs = [[tirx.BufferLoad(kept, [v]), tirx.BufferLoad(kept, [v + words // 2])] for v in range(words // 2)]
        vectors = [tirx.Shuffle(pair, order) for pair in pairs for order in orders]
    return vectors


def _signed(plan: MatmulPlan, value: Expr) -> Expr:
    """Flip the top bit of every byte, which subtracts 128 and makes it int8; floats stay."""
    if not plan.integer:
        return value
    bits = tirx.reinterpret(f"uint8x{plan.vector}", value)
    return tirx.reinterpret(f"int8x{plan.vector}", tirx.bitwise_xor(bits, constant(128, "uint8", plan.vector)))


def _ones(plan: MatmulPlan) -> Expr:
    """The operand of a dot that stands for ones."""
    return tirx.reinterpret("int32", constant(plan.isa.activation_offset + 1, "uint8", plan.group))


def _step(plan: MatmulPlan, b: tirx.Buffer, at: Expr, kept: int) -> Expr:
    """The elements of one step of one vector of columns: lane by lane, `group` elements of the contraction each."""
    lanes, stride = plan.isa.lanes, plan.key.matmul.b[-2]
    rows = [_columns(plan, b, at + i * stride) for i in range(kept)]
    if not plan.integer:
        return rows[0]
    rows += [constant(128, "uint8", lanes)] * (plan.group - kept)
    order = [tirx.const(i * lanes + lane, "int32") for lane in range(lanes) for i in range(plan.group)]
    return _signed(plan, tirx.Shuffle(rows, order))


def _columns(plan: MatmulPlan, b: tirx.Buffer, at: Expr) -> Expr:
    """One row of b at a vector of columns; beyond a row shorter than the vector, anything."""
    lanes, n, stride = plan.isa.lanes, plan.key.matmul.extents[-2], plan.key.matmul.b[-1]
    kept = min(lanes, n)
    value = load(b, at, kept) if stride == 1 or kept == 1 else tirx.BufferLoad(b, [tirx.Ramp(at, stride, kept)])
    if kept == lanes:
        return value
    if kept == 1:
        return splat(value, lanes)
    unused = constant(0, b.dtype, lanes - kept)
    return tirx.Shuffle([value, unused], [tirx.const(i, "int32") for i in range(lanes)])
