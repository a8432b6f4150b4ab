"""Kernels that move values between layouts, channels first and last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cuda.epilogue import declare_arguments, finished
from qsearch.kernels.cuda.simt import grid, kernel, load, move, mul, registers, shared, store, sync, vector_lanes
from qsearch.kernels.cuda.vectors import fetched, items
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["to_channels_first", "to_channels_last"]

# Up to this many channels a thread holds whole pixels.
FEW_CHANNELS = 4
# Edge of the square tiles that are turned in shared memory, and threads that work on one.
EDGE, ROWS = 32, 8

Put = Callable[[Expr], Expr]


def to_channels_last(key: OpKey, arch: str) -> Kernel | None:
    """Describe (N, C, H, W) -> (N, H, W, C), quantizing on the way to another dtype; None for others."""
    if key.kind != "to_channels_last":
        return None
    n, channels, height, width = key.shapes[0]

    def body() -> None:
        size = int(np.prod(key.shapes[0]))
        source = T.arg("source", T.Buffer((size,), key.dtypes[0]))
        arguments = declare_arguments()
        output = T.arg("output", T.Buffer((size,), key.dtypes[-1]))

        def quantized(value: Expr) -> Expr:
            if key.dtypes[-1] == key.dtypes[0]:
                return value
            return finished(key.dtypes[-1], mul(value, arguments.float("multiplier")), arguments, False)

        planes = _Matrices(n, channels, height * width, source, output)
        if channels <= FEW_CHANNELS:
            _interleave(planes, quantized)
        else:
            _transpose(planes, quantized)

    return Kernel(key, (), lambda symbol: kernel(symbol, body), lambda constants: (constants["integers"], constants["floats"]))


def to_channels_first(key: OpKey, arch: str) -> Kernel | None:
    """Describe (N, H, W, C) -> (N, C, H, W), for operators that want torch's layout; None for others."""
    if key.kind != "to_channels_first":
        return None
    n, height, width, channels = key.shapes[0]

    def body() -> None:
        size = int(np.prod(key.shapes[0]))
        source = T.arg("source", T.Buffer((size,), key.dtypes[0]))
        output = T.arg("output", T.Buffer((size,), key.dtypes[-1]))
        _transpose(_Matrices(n, height * width, channels, source, output), lambda value: value)

    return Kernel(key, (), lambda symbol: kernel(symbol, body), lambda constants: ())


@dataclass(frozen=True)
class _Matrices:
    """`count` matrices, rows by columns in `source`, columns by rows in `output`."""

    count: int
    rows: int
    columns: int
    source: tirx.Buffer
    output: tirx.Buffer


def _interleave(planes: _Matrices, converted: Put) -> None:
    """Few channels: a thread reads adjacent pixels of every plane and writes them whole."""
    channels, pixels, dtype = planes.rows, planes.columns, str(planes.output.dtype)
    lanes = vector_lanes(pixels, str(planes.source.dtype))
    piece = vector_lanes(lanes * channels, dtype)
    with items(planes.count * (pixels // lanes)) as item:
        image, first = item // (pixels // lanes), item % (pixels // lanes) * lanes
        made = registers(lanes * channels, dtype)
        for c in range(channels):
            given = fetched(planes.source, image * (channels * pixels) + c * pixels + first, lanes)
            for i in range(lanes):
                store(made, i * channels + c, converted(load(given, i)))
        for at in range(0, lanes * channels, piece):
            move(planes.output, (image * pixels + first) * channels + at, made, at, piece)


def _transpose(matrices: _Matrices, converted: Put) -> None:
    """Turn square tiles in shared memory: adjacent threads read adjacent columns and write adjacent rows.

    A tile's rows lie one element further apart than they are long, so that a column's elements lie in different banks.
    """
    rows, columns = matrices.rows, matrices.columns
    down, across = -(-rows // EDGE), -(-columns // EDGE)
    with grid(matrices.count * down * across, EDGE * ROWS) as (block, thread):
        base = block // (down * across) * (rows * columns)
        row, column = block // across % down * EDGE, block % across * EDGE
        tile = shared(EDGE * (EDGE + 1), str(matrices.output.dtype))
        slow, fast = thread // EDGE, thread % EDGE
        for step in range(0, EDGE, ROWS):
            at = slow + step
            with T.If(tirx.all(row + at < rows, column + fast < columns)), T.Then():
                value = load(matrices.source, base + (row + at) * columns + column + fast)
                store(tile, at * (EDGE + 1) + fast, converted(value))
        sync()
        for step in range(0, EDGE, ROWS):
            at = slow + step
            with T.If(tirx.all(row + fast < rows, column + at < columns)), T.Then():
                store(matrices.output, base + (column + at) * rows + row + fast, load(tile, fast * (EDGE + 1) + at))
