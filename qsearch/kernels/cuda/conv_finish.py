"""What happens to a tile's sums: through shared memory, so that outputs and residuals move in wide runs, then finished."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cuda.conv_layout import Place, kept
from qsearch.kernels.cuda.conv_plan import ConvPlan
from qsearch.kernels.cuda.conv_units import Units, staged_sum
from qsearch.kernels.cuda.epilogue import FLOAT_DTYPES, Arguments, declare_arguments, dequantized, finished, held
from qsearch.kernels.cuda.simt import add, converted, load, move, mul, registers, store, sync, vector_lanes

__all__ = ["ConvBuffers", "declare_buffers", "finish"]


@dataclass(frozen=True)
class ConvBuffers:
    """A kernel's arguments."""

    source: tirx.Buffer
    residual: tirx.Buffer | None
    weight: tirx.Buffer
    bias: tirx.Buffer
    multiplier: tirx.Buffer | None
    clip_high: tirx.Buffer | None
    arguments: Arguments
    output: tirx.Buffer


def declare_buffers(plan: ConvPlan) -> ConvBuffers:
    """Declare the arguments: inputs, packed weight, packed constants, output."""
    key, channels = plan.key, plan.key.conv.groups * plan.packed_columns

    def argument(name: str, size: int, dtype: str, wanted: bool = True) -> tirx.Buffer | None:
        return T.arg(name, T.Buffer((size,), dtype)) if wanted else None

    size = 1
    for extent in key.shapes[0]:
        size *= extent
    outputs = plan.pixels * key.shapes[-1][3]
    words = plan.key.conv.groups * plan.column_tiles * plan.steps * plan.packed_words
    weights = plan.tables_at[2] if plan.nibbles else words * 4 // plan.itemsize
    return ConvBuffers(
        argument("source", size, key.dtypes[0]),
        argument("residual", outputs, key.dtypes[1], key.residual),
        argument("weight", weights, plan.dtypes[1]),
        argument("bias", channels, plan.dtypes[2]),
        argument("multiplier", channels, "float32", plan.scaled),
        argument("clip_high", channels, "float32", key.clips_channels),
        declare_arguments(),
        argument("output", outputs, key.dtypes[-1]),
    )


class _Columns:
    """Adjacent output channels, the same in all rows that a thread finishes, and their constants.

    Args:
        plan: The kernel.
        buffers: Its arguments.
        place: The thread.
        first: The first of the channels, counted within the tile.
        lanes: How many.
    """

    def __init__(self, plan: ConvPlan, buffers: ConvBuffers, place: Place, first: Expr, lanes: int) -> None:
        self.plan, self.buffers, self.first, self.lanes = plan, buffers, first, lanes
        self.channel = kept(place.column_tile * plan.tile.columns + first)
        packed = place.group * plan.packed_columns + self.channel
        self.multiplier, self.clip_high, self.bias = (
            self._constants(x, packed) for x in (buffers.multiplier, buffers.clip_high, buffers.bias if plan.bias_last else None)
        )
        self.output = kept(place.group * plan.out_channels + self.channel)

    def _constants(self, buffer: tirx.Buffer | None, first: Expr) -> tirx.Buffer | None:
        if buffer is None:
            return None
        values = registers(self.lanes, str(buffer.dtype))
        move(values, 0, buffer, first, self.lanes)
        return values

    def write(self, sums: tirx.Buffer, pixel: Expr) -> None:
        """Finish the sums of one pixel and write them, if the pixel and the channels exist.

        Only the store hangs on that, so that the work on several rows can overlap.
        """
        key, buffers = self.plan.key, self.buffers
        place, tests = kept(pixel * key.shapes[-1][3] + self.output), []
        if self.plan.pixels % self.plan.tile.rows:
            tests.append(pixel < self.plan.pixels)
        if self.plan.out_channels % self.plan.tile.columns:
            tests.append(self.channel < self.plan.out_channels)
        residual = None
        if key.residual:
            residual = registers(self.lanes, key.dtypes[1])
            last = self.plan.pixels * key.shapes[-1][3] - self.lanes
            move(residual, 0, buffers.residual, tirx.min(place, last) if tests else place, self.lanes)
        made = registers(self.lanes, key.dtypes[-1])
        for i in range(self.lanes):
            store(made, i, self._value(i, load(sums, i), residual))
        _under(tests, lambda: move(buffers.output, place, made, 0, self.lanes))

    def _value(self, i: int, total: Expr, residual: tirx.Buffer | None) -> Expr:
        key, arguments = self.plan.key, self.buffers.arguments
        value = mul(converted(total, "float32"), load(self.multiplier, i)) if self.plan.scaled else total
        if self.bias is not None:
            value = add(value, load(self.bias, i))
        if residual is not None:
            value = add(value, dequantized(load(residual, i), key.dtypes[1], arguments, "b"))
        if not self.plan.scaled and key.dtypes[-1] not in FLOAT_DTYPES:
            value = mul(value, arguments.float("multiplier"))
        if self.clip_high is not None:
            value = tirx.min(value, load(self.clip_high, i))
        return finished(key.dtypes[-1], value, arguments, key.clipped)


def _under(tests: list[Expr], body: Callable[[], None]) -> None:
    if not tests:
        body()
        return
    with T.If(tirx.all(*tests)), T.Then():
        body()


def finish(plan: ConvPlan, buffers: ConvBuffers, units: Units, shared: tirx.Buffer, place: Place) -> None:
    """Write a block's outputs. All threads have done with shared memory before, and wait for one another here."""
    tile, lanes = plan.tile, vector_lanes(plan.out_channels, "float32")
    buffers = replace(buffers, arguments=held(buffers.arguments))
    runs = tile.columns // lanes
    # A power of two divides the threads: of 24 runs 8 are finished at a time, whole rows of 8.
    across = runs & -runs
    height, rows = tile.rows // plan.parts, tile.threads // across
    first, run = kept(place.thread // across), kept(place.thread % across * lanes)
    columns = [_Columns(plan, buffers, place, run + i * across * lanes, lanes) for i in range(runs // across)]
    for part in range(plan.parts):
        sync()
        units.stage(shared, part * (tile.warp_rows // 16 // plan.parts), tile.warp_rows // 16 // plan.parts)
        sync()

        def finish_row(i: Expr | int) -> None:
            row = kept(first + i * rows)
            _under([row < height] if height < rows else [], lambda: _finish_row(plan, columns, shared, (part, row, place)))

        if rows >= height:
            finish_row(0)
            continue
        with T.serial(0, height // rows) as i:
            finish_row(i)


def _finish_row(plan: ConvPlan, columns: list[_Columns], shared: tirx.Buffer, where: tuple[int, Expr, Place]) -> None:
    """Finish a row of a part of the sums."""
    tile, (part, row, place) = plan.tile, where
    # Rows of a warp in one part.
    each = tile.warp_rows // plan.parts
    pixel = kept(place.row_tile * tile.rows + row // each * tile.warp_rows + part * each + row % each)
    apart = tile.rows // plan.parts * tile.staged_row
    for some in columns:
        word = row * tile.staged_row + some.first
        some.write(staged_sum(shared, word, apart, tile.warps[2], some.lanes, plan.dtypes[2]), pixel)
