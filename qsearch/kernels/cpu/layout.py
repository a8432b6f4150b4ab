"""Kernels that move values between layouts, channels first and last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cpu.epilogue import Arguments, declare_arguments, finished
from qsearch.kernels.cpu.isa import Isa
from qsearch.kernels.cpu.vectors import SHARED_ELEMENTS, kernel, load, loop, rounded_product, splat, store
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["to_channels_first", "to_channels_last"]

# Up to this many channels are interleaved whole pixels at a time.
FEW_CHANNELS = 4


def to_channels_last(key: OpKey, isa: Isa, threads: int) -> Kernel | None:
    """Describe (N, C, H, W) -> (N, H, W, C), quantizing on the way to an integer output; None for others."""
    if key.kind != "to_channels_last":
        return None

    def generate(symbol: str) -> tirx.PrimFunc:
        def body() -> None:
            size = int(np.prod(key.shapes[0]))
            source = T.arg("source", T.Buffer((size,), key.dtypes[0]))
            arguments = declare_arguments()
            output = T.arg("output", T.Buffer((size,), key.dtypes[-1]))
            n, channels, height, width = key.shapes[0]

            def put(value: Expr, lanes: int) -> Expr:
                return _quantized(key, isa, value, lanes, arguments)

            if channels <= FEW_CHANNELS:
                _interleave(_Matrices(n, channels, height * width, source, output), isa, put, threads)
            else:
                _transpose(_Matrices(n, channels, height * width, source, output), isa.lanes, put, threads)

        return kernel(symbol, body)

    return Kernel(key, (isa.name,), generate, lambda constants: (constants["integers"], constants["floats"]))


def to_channels_first(key: OpKey, isa: Isa, threads: int) -> Kernel | None:
    """Describe (N, H, W, C) -> (N, C, H, W), for operators that want torch's layout; None for others."""
    if key.kind != "to_channels_first":
        return None

    def generate(symbol: str) -> tirx.PrimFunc:
        def body() -> None:
            n, height, width, channels = key.shapes[0]
            size = int(np.prod(key.shapes[0]))
            source = T.arg("source", T.Buffer((size,), key.dtypes[0]))
            output = T.arg("output", T.Buffer((size,), key.dtypes[-1]))
            _transpose(_Matrices(n, height * width, channels, source, output), isa.lanes, lambda value, lanes: value, threads)

        return kernel(symbol, body)

    return Kernel(key, (isa.name,), generate, lambda constants: ())


def _quantized(key: OpKey, isa: Isa, value: Expr, lanes: int, arguments: Arguments) -> Expr:
    """The value as the output holds it."""
    if key.dtypes[-1] == key.dtypes[0]:
        return value
    value = rounded_product(value, splat(arguments.float("multiplier"), lanes), lanes)
    return finished(isa, key.dtypes[-1], value, lanes, arguments, False)


@dataclass(frozen=True)
class _Matrices:
    """`count` matrices, rows by columns in `source`, columns by rows in `output`."""

    count: int
    rows: int
    columns: int
    source: tirx.Buffer
    output: tirx.Buffer


Put = Callable[[Expr, int], Expr]


def _interleave(planes: _Matrices, isa: Isa, put: Put, threads: int) -> None:
    """Few rows: convert a vector of each, then interleave them with one shuffle."""
    channels, pixels = planes.rows, planes.columns
    lanes = min(isa.lanes, 1 << (pixels.bit_length() - 1))
    blocks = -(-pixels // lanes)
    with loop(planes.count * blocks, threads if planes.count * pixels * channels > SHARED_ELEMENTS else 1) as step:
        # The last block overlaps its neighbour.
        first = tirx.min(step % blocks * lanes, pixels - lanes) if pixels % lanes else step % blocks * lanes
        base = step // blocks * (channels * pixels)
        parts = [put(load(planes.source, base + c * pixels + first, lanes), lanes) for c in range(channels)]
        if lanes == 1:
            for c, part in enumerate(parts):
                store(planes.output, base + first * channels + c, part)
            return
        order = [tirx.const(c * lanes + i, "int32") for i in range(lanes) for c in range(channels)]
        value = tirx.Shuffle(parts, order) if channels > 1 else parts[0]
        store(planes.output, base + first * channels, value, lanes * channels)


def _transpose(matrices: _Matrices, lanes: int, put: Put, threads: int) -> None:
    """Transpose in square tiles of vectors, the last of each axis overlapping its neighbour."""
    rows, columns = matrices.rows, matrices.columns
    edge = 1 << (min(lanes, rows, columns).bit_length() - 1)
    down, across = -(-rows // edge), -(-columns // edge)
    work = matrices.count * rows * columns
    with loop(matrices.count * across, threads if work > SHARED_ELEMENTS else 1) as step, T.serial(0, down) as i:
        row, column = tirx.min(i * edge, rows - edge), tirx.min(step % across * edge, columns - edge)
        base = step // across * (rows * columns)
        tile = [T.bind(put(load(matrices.source, base + (row + r) * columns + column, edge), edge)) for r in range(edge)]
        for c, vector in enumerate(_transposed(tile, edge)):
            store(matrices.output, base + (column + c) * rows + row, vector, edge)


def _transposed(tile: list[Expr], edge: int) -> list[Expr]:
    """Transpose a square tile: every pass interleaves the first half of its rows with the second."""
    low = [tirx.const(i // 2 + i % 2 * edge, "int32") for i in range(edge)]
    high = [tirx.const(i // 2 + i % 2 * edge + edge // 2, "int32") for i in range(edge)]
    half = edge // 2
    passes = edge.bit_length() - 1
    for _ in range(passes):
        pairs = list(zip(tile[:half], tile[half:], strict=True))
        # Bound to names, because an expression is written out again wherever it is used.
        tile = [T.bind(tirx.Shuffle([a, b], order)) for a, b in pairs for order in (low, high)]
    return tile
