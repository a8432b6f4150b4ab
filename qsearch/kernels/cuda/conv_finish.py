"""What happens to a tile's sums: through shared memory, so that outputs and residuals move in wide runs, then finished."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cuda.conv_layout import Place, divided, kept
from qsearch.kernels.cuda.conv_plan import ConvPlan
from qsearch.kernels.cuda.conv_units import Units, staged_sum
from qsearch.kernels.cuda.epilogue import FLOAT_DTYPES, Arguments, declare_arguments, dequantized, finished
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
        argument("multiplier", channels, "float32", plan.integer),
        argument("clip_high", channels, "float32", key.clips_channels),
        declare_arguments(),
        argument("output", outputs, key.dtypes[-1]),
    )


class _Columns:
    """Adjacent output channels, the same in all rows a thread finishes, and their constants."""

    def __init__(self, plan: ConvPlan, buffers: ConvBuffers, place: Place) -> None:
        self.plan, self.buffers = plan, buffers
        self.lanes = vector_lanes(plan.out_channels, "float32")
        self.across = plan.tile.columns // self.lanes
        # Rows that the block finishes at a time; of a count of threads that is no multiple the last ones do nothing.
        self.rows = plan.tile.threads // self.across
        row, column = divided(place.thread, self.across)
        self.row, self.column = kept(row), kept(column * self.lanes)
        self.channel = kept(place.column_tile * plan.tile.columns + self.column)
        packed = place.group * plan.packed_columns + self.channel
        self.multiplier, self.clip_high = (self._constants(x, packed) for x in (buffers.multiplier, buffers.clip_high))
        self.output = kept(place.group * plan.out_channels + self.channel)

    def _constants(self, buffer: tirx.Buffer | None, first: Expr) -> tirx.Buffer | None:
        if buffer is None:
            return None
        values = registers(self.lanes, str(buffer.dtype))
        move(values, 0, buffer, first, self.lanes)
        return values

    def write(self, sums: tirx.Buffer, pixel: Expr) -> None:
        """Finish the sums of one pixel and write them."""
        key, buffers = self.plan.key, self.buffers
        place = pixel * key.shapes[-1][3] + self.output
        residual = None
        if key.residual:
            residual = registers(self.lanes, key.dtypes[1])
            move(residual, 0, buffers.residual, place, self.lanes)
        made = registers(self.lanes, key.dtypes[-1])
        for i in range(self.lanes):
            store(made, i, self._value(i, load(sums, i), residual))
        move(buffers.output, place, made, 0, self.lanes)

    def _value(self, i: int, total: Expr, residual: tirx.Buffer | None) -> Expr:
        key, arguments = self.plan.key, self.buffers.arguments
        value = mul(converted(total, "float32"), load(self.multiplier, i)) if self.plan.integer else total
        if residual is not None:
            value = add(value, dequantized(load(residual, i), key.dtypes[1], arguments, "b"))
        if not self.plan.integer and key.dtypes[-1] not in FLOAT_DTYPES:
            value = mul(value, arguments.float("multiplier"))
        if self.clip_high is not None:
            value = tirx.min(value, load(self.clip_high, i))
        return finished(key.dtypes[-1], value, arguments, key.clipped)


def finish(plan: ConvPlan, buffers: ConvBuffers, units: Units, shared: tirx.Buffer, place: Place) -> None:
    """Write a block's outputs. All threads have done with shared memory before, and wait for one another here."""
    tile, columns = plan.tile, _Columns(plan, buffers, place)
    blocks = tile.warp_rows // 16 // plan.parts
    height = tile.warps[0] * blocks * 16
    for part in range(plan.parts):
        sync()
        units.stage(shared, part * blocks, blocks)
        sync()
        rounds = -(-height // columns.rows)
        if rounds == 1:
            _finish_row(plan, columns, shared, place, (part, blocks, 0))
            continue
        with T.serial(0, rounds) as i:
            _finish_row(plan, columns, shared, place, (part, blocks, i))


def _finish_row(plan: ConvPlan, columns: _Columns, shared: tirx.Buffer, place: Place, where: tuple[int, int, Expr | int]) -> None:
    """The thread's i-th row of a part of so many blocks of 16 rows per warp."""
    tile, (part, blocks, i) = plan.tile, where
    height = tile.warps[0] * blocks * 16
    row = kept(columns.row + i * columns.rows)
    inner = row // (blocks * 16) * tile.warp_rows + part * blocks * 16 + row % (blocks * 16)
    pixel = kept(place.row_tile * tile.rows + inner)
    tests = []
    if height % columns.rows:
        tests.append(row < height)
    if tile.threads % columns.across:
        tests.append(columns.row < columns.rows)
    if plan.pixels % tile.rows:
        tests.append(pixel < plan.pixels)
    if plan.out_channels % tile.columns:
        tests.append(columns.channel < plan.out_channels)

    def write() -> None:
        word = row * tile.staged_row + columns.column
        sums = staged_sum(shared, word, height * tile.staged_row, tile.warps[2], columns.lanes, plan.dtypes[2])
        columns.write(sums, pixel)

    if not tests:
        write()
        return
    with T.If(tirx.all(*tests)), T.Then():
        write()
