"""Maximum and average pooling over windows, the global average included.

Windows are cut at the image's edge: a maximum never sees the padding, and for an integer average a padded position, being the
zero point, adds nothing to the centred sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cuda.epilogue import FLOAT_DTYPES, Arguments, declare_arguments, finished
from qsearch.kernels.cuda.simt import (
    constant,
    converted,
    grid,
    kernel,
    load,
    mul,
    registers,
    shared,
    store,
    sync,
    vector_lanes,
)
from qsearch.kernels.cuda.vectors import fetched, items, put
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["pool2d"]

MOST_LANES = 4
# Windows of at most so many positions are written out.
MOST_WRITTEN_OUT = 25
# Whole windows of at least so many positions are shared between threads, where outputs alone make few of them.
LEAST_SHARED, FEW_THREADS = 16, 1 << 16
# Threads side by side on adjacent channels, and threads that share a window.
ACROSS, SHARES = 32, 8
LEAST = {"float32": -3.402823466e38, "int16": -(2**15)}


def pool2d(key: OpKey, arch: str) -> Kernel | None:
    """Describe max_pool2d or avg_pool2d; None for another operation.

    Args:
        key: shapes ((N, H, W, C), (N, OH, OW, C)).
        arch: Architecture.
    """
    if key.kind not in ("max_pool2d", "avg_pool2d"):
        return None

    def body() -> None:
        source = T.arg("source", T.Buffer((int(np.prod(key.shapes[0])),), key.dtypes[0]))
        arguments = declare_arguments()
        pooling = _Pooling(key, source, arguments, T.arg("output", T.Buffer((int(np.prod(key.shapes[-1])),), key.dtypes[-1])))
        if pooling.is_shared:
            pooling.write_shared()
        else:
            pooling.write()

    return Kernel(key, (), lambda symbol: kernel(symbol, body), lambda constants: (constants["integers"], constants["floats"]))


@dataclass(frozen=True)
class _Window:
    """The part of a window that lies inside the image, from `at`, the index of its first channels in the source."""

    at: Expr
    rows: Expr | int
    columns: Expr | int


@dataclass(frozen=True)
class _Pooling:
    """A pooling kernel while it is being written."""

    key: OpKey
    source: tirx.Buffer
    arguments: Arguments
    output: tirx.Buffer

    @property
    def maximum(self) -> bool:
        """True for a maximum, false for an average."""
        return self.key.kind == "max_pool2d"

    @property
    def total(self) -> str:
        """Dtype in which a window is reduced; float32 holds every float16."""
        dtype = self.key.dtypes[0]
        if dtype in FLOAT_DTYPES:
            return "float32"
        return dtype if self.maximum else "int32"

    @property
    def lanes(self) -> int:
        """Adjacent channels of a thread."""
        return min(vector_lanes(self.key.shapes[0][-1], *self.key.dtypes), MOST_LANES)

    @property
    def groups(self) -> int:
        """Threads that share a position."""
        return self.key.shapes[0][-1] // self.lanes

    @property
    def positions(self) -> int:
        """Output positions of all images."""
        return int(np.prod(self.key.shapes[-1][:3]))

    @property
    def window(self) -> int:
        """Positions of a window."""
        return int(np.prod(self.key.pool.kernel))

    @property
    def is_shared(self) -> bool:
        """True where several threads reduce one window."""
        few = self.positions * self.groups < FEW_THREADS
        return not any(self.key.pool.padding) and self.window >= LEAST_SHARED and few

    def write(self) -> None:
        """One thread per output position and vector of channels."""
        with items(self.positions * self.groups) as item:
            group, position = item % self.groups, item // self.groups
            total = registers(self.lanes, self.total)
            for lane in range(self.lanes):
                store(total, lane, self._start())
            window = self._window(position, group)
            rows, columns, (_, _, width, channels) = window.rows, window.columns, self.key.shapes[0]
            if self.window <= MOST_WRITTEN_OUT:
                self._written_out(total, window, width * channels)
            else:
                with T.serial(0, rows) as i, T.serial(0, columns) as j:
                    self._take(total, window.at + (i * width + j) * channels)
            self._store(total, rows * columns, (position * self.groups + group) * self.lanes)

    def _written_out(self, total: tirx.Buffer, window: _Window, line: int) -> None:
        """Every position of the window, where it exists: loads that need not wait for one another."""
        for i in range(self.key.pool.kernel[0]):
            for j in range(self.key.pool.kernel[1]):
                place = window.at + (i * line + j * self.key.shapes[0][-1])
                if isinstance(window.rows, int):
                    self._take(total, place)
                else:
                    with T.If(tirx.all(window.rows > i, window.columns > j)), T.Then():
                        self._take(total, place)

    def _window(self, position: Expr, group: Expr) -> _Window:
        """The window of an output position."""
        _, height, width, channels = self.key.shapes[0]
        _, out_height, out_width, _ = self.key.shapes[-1]
        pool = self.key.pool
        x, y, image = position % out_width, position // out_width % out_height, position // (out_width * out_height)
        row, rows = self._cut(y * pool.stride[0], pool.padding[0], pool.kernel[0], height)
        column, columns = self._cut(x * pool.stride[1], pool.padding[1], pool.kernel[1], width)
        return _Window(((image * height + row) * width + column) * channels + group * self.lanes, rows, columns)

    def _cut(self, start: Expr, before: int, length: int, extent: int) -> tuple[Expr, Expr | int]:
        """(first, count) of the positions that lie inside the image."""
        if not any(self.key.pool.padding):
            return start, length
        first = tirx.max(start - before, 0)
        return first, tirx.max(tirx.min(start - before + length, extent) - first, 0)

    def write_shared(self) -> None:
        """A block per output position and run of channels: its threads share the windows, then one sums what they found."""
        (kh, kw), (_, _, width, channels) = self.key.pool.kernel, self.key.shapes[0]
        across = min(ACROSS, self.groups)
        blocks = -(-self.groups // across)
        with grid(self.positions * blocks, across * SHARES) as (block, thread):
            share, group = thread // across, block % blocks * across + thread % across
            position = block // blocks
            total, found = registers(self.lanes, self.total), shared(SHARES * across * self.lanes, self.total)
            for lane in range(self.lanes):
                store(total, lane, self._start())
            with T.If(group < self.groups), T.Then():
                window = self._window(position, group)
                with T.serial(0, (kh * kw - share + SHARES - 1) // SHARES) as step:
                    place = step * SHARES + share
                    self._take(total, window.at + (place // kw * width + place % kw) * channels)
            for lane in range(self.lanes):
                store(found, (share * self.lanes + lane) * across + thread % across, load(total, lane))
            sync()
            with T.If(tirx.all(share == 0, group < self.groups)), T.Then():
                for other in range(1, SHARES):
                    for lane in range(self.lanes):
                        value = load(found, (other * self.lanes + lane) * across + thread)
                        store(total, lane, self._joined(load(total, lane), value))
                self._store(total, kh * kw, (position * self.groups + group) * self.lanes)

    def _start(self) -> Expr:
        return constant(LEAST.get(self.total, 0) if self.maximum else 0, self.total)

    def _joined(self, a: Expr, b: Expr) -> Expr:
        return tirx.max(a, b) if self.maximum else a + b

    def _take(self, total: tirx.Buffer, at: Expr) -> None:
        """Join one position's channels, from index `at` of the source."""
        given = fetched(self.source, at, self.lanes)
        for lane in range(self.lanes):
            store(total, lane, self._joined(load(total, lane), converted(load(given, lane), self.total)))

    def _store(self, total: tirx.Buffer, count: Expr | int, out: Expr) -> None:
        made = registers(self.lanes, self.key.dtypes[-1])
        for lane in range(self.lanes):
            value = load(total, lane)
            if self.maximum:
                store(made, lane, converted(value, self.key.dtypes[-1]))
            else:
                value = self._average(value, count)
                store(made, lane, finished(self.key.dtypes[-1], value, self.arguments, self.key.clipped))
        put(self.output, out, made, self.lanes)

    def _average(self, total: Expr, count: Expr | int) -> Expr:
        """From a window's sum to its float32 average in steps of the output."""
        multiplier = self.arguments.float("multiplier")
        if self.key.dtypes[0] not in FLOAT_DTYPES:
            number = constant(count, "int32") if isinstance(count, int) else count
            centred = total - number * self.arguments.integer("a_zero_point")
            return mul(converted(centred, "float32"), multiplier)
        if self.key.pool.count_include_pad or isinstance(count, int):
            return mul(mul(total, constant(float(np.float32(1 / self.window)), "float32")), multiplier)
        return mul(total / converted(count, "float32"), multiplier)
