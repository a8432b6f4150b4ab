"""Depthwise convolution: a thread computes adjacent channels of a run of output columns of one row.

Every input vector of a kernel row is loaded once and used by all the output columns it reaches, every weight by all the
columns; adjacent threads hold adjacent channels, so that what a warp loads is contiguous. Padded positions hold the input's
zero point, as the bias supposes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cuda.depthwise_plan import DepthwisePlan
from qsearch.kernels.cuda.epilogue import FLOAT_DTYPES, Arguments, declare_arguments, dequantized, finished
from qsearch.kernels.cuda.simt import add, constant, converted, fma, kernel, load, mul, registers, store
from qsearch.kernels.cuda.vectors import fetch, fetched, items, put
from qsearch.kernels.description import Kernel
from qsearch.qtype import PRECISIONS
from qsearch.quantize.program import OpKey

__all__ = ["depthwise"]


def depthwise(key: OpKey, arch: str) -> Kernel | None:
    """Describe a convolution whose every group has one input channel, or None for another operation.

    Args:
        key: kind 'conv2d' with groups = input channels > 1; a group may have several output channels.
        arch: Architecture.
    """
    if key.kind != "conv2d" or key.conv.groups != key.shapes[0][3] or key.conv.groups == 1:
        return None
    plan = DepthwisePlan(key)

    def pack(constants: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        return (*(constants[name] for name in plan.channel_constants), constants["integers"], constants["floats"])

    return Kernel(key, (), lambda symbol: kernel(symbol, lambda: _write(plan)), pack, 0, _pack_weight)


def _pack_weight(constants: dict[str, np.ndarray]) -> np.ndarray:
    """(O, kh, kw, 1) -> flat (kh, kw, O); 4-bit weights are held as bytes, groups applied."""
    return np.ascontiguousarray(constants["weight"][..., 0].transpose(1, 2, 0)).ravel()


@dataclass(frozen=True)
class _Buffers:
    """The kernel's arguments; None for those it does not take."""

    source: tirx.Buffer
    residual: tirx.Buffer | None
    weight: tirx.Buffer
    channel: dict[str, tirx.Buffer]
    arguments: Arguments
    output: tirx.Buffer


def _declare(plan: DepthwisePlan) -> _Buffers:
    key, sizes = plan.key, [int(np.prod(shape)) for shape in plan.key.shapes]
    source = T.arg("source", T.Buffer((sizes[0],), key.dtypes[0]))
    residual = T.arg("residual", T.Buffer((sizes[1],), key.dtypes[1])) if key.residual else None
    count = int(np.prod(key.conv.kernel)) * plan.channels
    weight = T.arg(
        "weight", T.Buffer((count,), PRECISIONS[key.precision].weight.dtype if key.precision in PRECISIONS else "float16")
    )
    channel = {}
    for name in plan.channel_constants:
        dtype = plan.total if name == "bias" else "float32"
        channel[name] = T.arg(name, T.Buffer((plan.channels,), dtype))
    arguments = declare_arguments()
    return _Buffers(source, residual, weight, channel, arguments, T.arg("output", T.Buffer((sizes[-1],), key.dtypes[-1])))


def _write(plan: DepthwisePlan) -> None:
    buffers = _declare(plan)
    with items(plan.threads) as item:
        group, rest = item % plan.groups, item // plan.groups
        tile, row = rest % plan.tiles, rest // plan.tiles
        _Tile(plan, buffers, group * plan.lanes, tile * plan.columns, row).write()


@dataclass(frozen=True)
class _Tile:
    """What one thread computes.

    Attributes:
        plan: Static numbers.
        buffers: The kernel's arguments.
        channel: First output channel.
        x: First output column.
        row: Output row, counted through all images.
    """

    plan: DepthwisePlan
    buffers: _Buffers
    channel: Expr
    x: Expr
    row: Expr

    def write(self) -> None:
        """Sum over the kernel's rows, then store."""
        plan, conv = self.plan, self.plan.key.conv
        _, height, width, channels = plan.key.shapes[0]
        totals = registers(plan.columns * plan.lanes, plan.total)
        bias = fetched(self.buffers.channel["bias"], self.channel, plan.lanes)
        for i in range(plan.columns * plan.lanes):
            store(totals, i, load(bias, i % plan.lanes))
        out_height = plan.key.shapes[-1][1]
        image, y = self.row // out_height, self.row % out_height

        def kernel_row(kh: Expr | int) -> None:
            line = y * conv.stride[0] - conv.padding[0] + kh * conv.dilation[0]
            pixel = (image * height + line) * width + self.x * conv.stride[1] - conv.padding[1]
            self._row(totals, kh, tirx.all(line >= 0, line < height), pixel * channels + self.channel // plan.multiple)

        if plan.written_out:
            for kh in range(conv.kernel[0]):
                kernel_row(kh)
        else:
            with T.serial(0, conv.kernel[0]) as kh:
                kernel_row(kh)
        self._finish(totals)

    def _row(self, totals: tirx.Buffer, kh: Expr | int, inside: Expr, at: Expr) -> None:
        """Add one row of the kernel.

        Args:
            totals: By output column, then channel.
            kh: The kernel's row.
            inside: Whether the input has that row.
            at: Index of the tile's first tap in the source; may lie outside.
        """
        plan, taps = self.plan, self.plan.key.conv.kernel[1]
        weights = registers(taps * plan.lanes, str(self.buffers.weight.dtype))
        for kw in range(taps):
            part = fetched(self.buffers.weight, (kh * taps + kw) * plan.channels + self.channel, plan.lanes)
            for lane in range(plan.lanes):
                store(weights, kw * plan.lanes + lane, load(part, lane))
        for column, uses in plan.reads:
            value = self._input(column, inside, at)
            for j, kw in uses:
                for lane in range(plan.lanes):
                    weight = converted(load(weights, kw * plan.lanes + lane), plan.total)
                    place, given = j * plan.lanes + lane, load(value, lane // plan.multiple)
                    store(totals, place, self._added(load(totals, place), given, weight))

    def _added(self, total: Expr, value: Expr, weight: Expr) -> Expr:
        return total + value * weight if self.plan.integer else fma(value, weight, total)

    def _input(self, column: int, inside: Expr, at: Expr) -> tirx.Buffer:
        """One input vector in the accumulators' dtype, the zero point where it is padding."""
        plan, dtype = self.plan, self.plan.key.dtypes[0]
        channels, lanes = plan.key.shapes[0][3], plan.input_lanes
        wide, given = registers(lanes, plan.total), registers(lanes, dtype)
        conditions = plan.conditions(self.x, column)
        if plan.rows_padded:
            conditions.append(inside)
        if conditions:
            with T.If(tirx.all(*conditions)):
                with T.Then():
                    fetch(given, self.buffers.source, at + column * channels, lanes)
                with T.Else():
                    fill = self.buffers.arguments.integer("a_zero_point") if plan.integer else constant(0, "int32")
                    for lane in range(lanes):
                        store(given, lane, converted(fill, dtype))
        else:
            fetch(given, self.buffers.source, at + column * channels, lanes)
        for lane in range(lanes):
            store(wide, lane, converted(load(given, lane), plan.total))
        return wide

    def _finish(self, totals: tirx.Buffer) -> None:
        """Store the tile's columns; the last tile of a row may have fewer."""
        plan, width = self.plan, self.plan.key.shapes[-1][2]
        names = [name for name in plan.channel_constants if name != "bias"]
        tables = {name: fetched(self.buffers.channel[name], self.channel, plan.lanes) for name in names}
        for j in range(plan.columns):
            at = (self.row * width + self.x + j) * plan.channels + self.channel
            if j and width % plan.columns:
                with T.If(self.x + j < width), T.Then():
                    self._column(totals, j, tables, at)
            else:
                self._column(totals, j, tables, at)

    def _column(self, totals: tirx.Buffer, j: int, tables: dict[str, tirx.Buffer], at: Expr) -> None:
        """Finish and store all channels of one output position."""
        plan, key, buffers = self.plan, self.plan.key, self.buffers
        made = registers(plan.lanes, key.dtypes[-1])
        residual = None if buffers.residual is None else fetched(buffers.residual, at, plan.lanes)
        for lane in range(plan.lanes):
            value = load(totals, j * plan.lanes + lane)
            if plan.integer:
                value = mul(converted(value, "float32"), load(tables["multiplier"], lane))
            if residual is not None:
                value = add(value, dequantized(load(residual, lane), key.dtypes[1], buffers.arguments, "b"))
            if not plan.integer and key.dtypes[-1] not in FLOAT_DTYPES:
                value = mul(value, buffers.arguments.float("multiplier"))
            if key.clips_channels:
                value = tirx.min(value, load(tables["clip_high"], lane))
            store(made, lane, finished(key.dtypes[-1], value, buffers.arguments, key.clipped))
        put(buffers.output, at, made, plan.lanes)
