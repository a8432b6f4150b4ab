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
from qsearch.kernels.cuda.layer import LayerBuffers, LayerEnd, declare_layer, pack_layer, starts_at_bias
from qsearch.kernels.cuda.simt import constant, converted, fma, kernel, load, registers, store
from qsearch.kernels.cuda.vectors import fetch, fetched, items
from qsearch.kernels.description import Kernel
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

    def generate(symbol: str) -> tirx.PrimFunc:
        return kernel(symbol, lambda: _write(plan))

    return Kernel(key, (), generate, lambda constants: pack_layer(key, constants), 0, _pack_weight)


def _pack_weight(constants: dict[str, np.ndarray]) -> np.ndarray:
    """(O, kh, kw, 1) -> flat (kh, kw, O); 4-bit weights are held as bytes, groups applied."""
    return np.ascontiguousarray(constants["weight"][..., 0].transpose(1, 2, 0)).ravel()


def _write(plan: DepthwisePlan) -> None:
    # Weights are of the input's dtype, bytes with a sign apart.
    dtype = "int8" if plan.key.dtypes[0] == "uint8" else plan.key.dtypes[0]
    buffers = declare_layer(plan.key, int(np.prod(plan.key.conv.kernel)) * plan.channels, dtype)
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
    buffers: LayerBuffers
    channel: Expr
    x: Expr
    row: Expr

    def write(self) -> None:
        """Sum over the kernel's rows, then store."""
        plan, conv = self.plan, self.plan.key.conv
        _, height, width, channels = plan.key.shapes[0]
        totals = registers(plan.columns * plan.lanes, plan.total)
        bias = fetched(self.buffers.channel["bias"], self.channel, plan.lanes) if starts_at_bias(plan.key) else None
        for i in range(plan.columns * plan.lanes):
            store(totals, i, constant(0, plan.total) if bias is None else load(bias, i % plan.lanes))
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
                    fill = self.buffers.arguments.integer("a_zero_point") if plan.integer else constant(0, "float32")
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
        end = LayerEnd(plan.key, self.buffers, self.channel, plan.lanes)
        for j in range(plan.columns):
            at = (self.row * width + self.x + j) * plan.channels + self.channel
            if j and width % plan.columns:
                with T.If(self.x + j < width), T.Then():
                    end.write(totals, j * plan.lanes, at)
            else:
                end.write(totals, j * plan.lanes, at)
