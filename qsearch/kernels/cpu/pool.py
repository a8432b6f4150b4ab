"""Maximum and average pooling over windows, the global average included."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cpu.epilogue import Arguments, declare_arguments, finish
from qsearch.kernels.cpu.isa import Isa
from qsearch.kernels.cpu.vectors import (
    SHARED_ELEMENTS,
    cast,
    constant,
    for_overlapping,
    kernel,
    load,
    loop,
    registers,
    rounded_product,
    splat,
    store,
    vector_type,
)
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["pool2d"]

# A window of at most so many positions is written out where it lies inside the image.
MOST_WRITTEN_OUT = 16
# So many uint8 values can be summed in 16 bits.
MOST_IN_16_BITS = 65535 // 255
LEAST = {"float32": -3.402823466e38, "int16": -(2**15)}


def pool2d(key: OpKey, isa: Isa, threads: int) -> Kernel | None:
    """Describe max_pool2d or avg_pool2d; None for another operation.

    Windows are cut at the image's edge: a maximum never sees the padding, and for an integer average a padded
    position, being the zero point, adds nothing to the centred sum.

    Args:
        key: shapes ((N, H, W, C), (N, OH, OW, C)).
        isa: Instruction set.
        threads: Threads to share the work between.
    """
    if key.kind not in ("max_pool2d", "avg_pool2d"):
        return None

    def generate(symbol: str) -> tirx.PrimFunc:
        return kernel(symbol, lambda: _pool2d(key, isa, threads))

    return Kernel(key, (isa.name,), generate, lambda constants: (constants["integers"], constants["floats"]))


def _pool2d(key: OpKey, isa: Isa, threads: int) -> None:
    (images, height, width, channels), (_, out_height, out_width, _) = key.shapes
    source = T.arg("source", T.Buffer((images * height * width * channels,), key.dtypes[0]))
    arguments = declare_arguments()
    output = T.arg("output", T.Buffer((images * out_height * out_width * channels,), key.dtypes[-1]))
    pooling = _Pooling(key, isa, source, arguments, output)
    (kh, kw), (sh, sw), (top, left, _, _) = key.pool.kernel, key.pool.stride, key.pool.padding
    work = images * out_height * out_width * channels * kh * kw
    with loop(images * out_height, threads if work > SHARED_ELEMENTS else 1) as row, T.serial(0, out_width) as x:
        first_row, (y, first_column) = row // out_height * height, (row % out_height * sh - top, x * sw - left)
        out = (row * out_width + x) * channels
        whole = _Window(first_row + y, first_column, kh, kw)
        if not any(key.pool.padding):
            pooling.write(whole, out)
            return
        with T.If(tirx.all(y >= 0, y + kh <= height, first_column >= 0, first_column + kw <= width)):
            with T.Then():
                pooling.write(whole, out)
            with T.Else():
                top_row, rows = _cut(y, kh, height)
                left_column, columns = _cut(first_column, kw, width)
                pooling.write(_Window(first_row + top_row, left_column, rows, columns), out)


@dataclass(frozen=True)
class _Window:
    """The part of a pooling window that lies inside the image.

    Attributes:
        row: Its first row, counted through all images.
        column: Its first column.
        rows: Number of rows; a constant for a whole window.
        columns: Number of columns.
    """

    row: Expr
    column: Expr
    rows: Expr | int
    columns: Expr | int


def _cut(start: Expr, length: int, extent: int) -> tuple[Expr, Expr]:
    """(first, count) of the positions that lie inside the image."""
    first = tirx.max(start, 0)
    return first, tirx.min(start + length, extent) - first


@dataclass(frozen=True)
class _Pooling:
    """A pooling kernel while it is being written."""

    key: OpKey
    isa: Isa
    source: tirx.Buffer
    arguments: Arguments
    output: tirx.Buffer

    @property
    def maximum(self) -> bool:
        """True for a maximum, false for an average."""
        return self.key.kind == "max_pool2d"

    @property
    def total_dtype(self) -> str:
        """Dtype in which a window is reduced."""
        dtype = self.key.dtypes[0]
        if self.maximum or dtype == "float32":
            return dtype
        return "uint16" if dtype == "uint8" and np.prod(self.key.pool.kernel) <= MOST_IN_16_BITS else "int32"

    def write(self, window: _Window, out: Expr) -> None:
        """Write all channels of one output position, which begin at `out`."""
        # Whole cache lines at a time, where the sums are not four times as wide.
        most = self.isa.lanes * (4 if self.total_dtype in ("uint8", "uint16") else 1)

        def block(channel: Expr | int, lanes: int) -> None:
            total = self._reduced(window, channel, lanes)
            if self.maximum:
                store(self.output, out + channel, total, lanes)
                return
            part = min(lanes, self.isa.lanes)
            for start in range(0, lanes, part):
                picked = [tirx.const(start + i, "int32") for i in range(part)]
                piece = total if part == lanes else tirx.Shuffle([total], picked)
                value = self._average(piece, window, part)
                finish(self.isa, self.output, out + channel + start, value, part, self.arguments, self.key.clipped)

        for_overlapping(self.key.shapes[0][-1], most, block)

    def _reduced(self, window: _Window, channel: Expr | int, lanes: int) -> Expr:
        """The maximum or sum over a window, for one block of channels."""
        dtype, (_, _, width, channels) = self.total_dtype, self.key.shapes[0]
        total = registers(1, vector_type(dtype, lanes))

        def tap(i: Expr | int, j: Expr | int) -> Expr:
            pixel = (window.row + i) * width + window.column + j
            value = load(self.source, pixel * channels + channel, lanes)
            return value if dtype == self.key.dtypes[0] else cast(value, dtype, lanes)

        def joined(a: Expr, b: Expr) -> Expr:
            return tirx.max(a, b) if self.maximum else a + b

        if isinstance(window.rows, int) and isinstance(window.columns, int) and window.rows * window.columns <= MOST_WRITTEN_OUT:
            taps = [tap(i, j) for i in range(window.rows) for j in range(window.columns)]
            T.buffer_store(total, reduce(joined, taps), [0])
            return tirx.BufferLoad(total, [0])
        least = LEAST.get(dtype, 0) if self.maximum else 0
        T.buffer_store(total, constant(least, dtype, lanes), [0])
        with T.serial(0, window.rows) as i, T.serial(0, window.columns) as j:
            T.buffer_store(total, joined(tirx.BufferLoad(total, [0]), tap(i, j)), [0])
        return tirx.BufferLoad(total, [0])

    def _average(self, total: Expr, window: _Window, lanes: int) -> Expr:
        """From a window's sum to its float32 average in steps of the output."""
        multiplier = splat(self.arguments.float("multiplier"), lanes)
        count = window.rows * window.columns
        if self.key.dtypes[0] != "float32":
            number = constant(count, "int32") if isinstance(count, int) else tirx.Cast("int32", count)
            centred = cast(total, "int32", lanes) - splat(number * self.arguments.integer("a_zero_point"), lanes)
            return rounded_product(cast(centred, "float32", lanes), multiplier, lanes)
        if self.key.pool.count_include_pad or isinstance(count, int):
            mean = total * constant(float(np.float32(1 / np.prod(self.key.pool.kernel))), "float32", lanes)
        else:
            mean = total / splat(tirx.Cast("float32", count), lanes)
        return rounded_product(mean, multiplier, lanes)
