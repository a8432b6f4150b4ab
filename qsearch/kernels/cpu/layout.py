"""Kernels that move values between layouts: channels first and last, and concatenation over channels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cpu.epilogue import Arguments, declare_arguments, finish
from qsearch.kernels.cpu.isa import Isa
from qsearch.kernels.cpu.vectors import cast, for_vectors, kernel, load, rounded_product, splat, store
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["concat", "to_channels_first", "to_channels_last"]


def to_channels_last(key: OpKey, isa: Isa, threads: int) -> Kernel | None:
    """Describe (N, C, H, W) -> (N, H, W, C), quantizing on the way to an integer output; None for others."""
    if key.kind != "to_channels_last":
        return None
    n, channels, height, width = key.shapes[0]
    pixels = height * width

    def generate(symbol: str) -> tirx.PrimFunc:
        def body() -> None:
            source = T.arg("source", T.Buffer((n * channels * pixels,), key.dtypes[0]))
            arguments = declare_arguments()
            output = T.arg("output", T.Buffer((n * channels * pixels,), key.dtypes[-1]))
            with T.serial(0, n) as image:
                base = image * (channels * pixels)
                for_vectors(pixels, isa.lanes, lambda i, m: _interleave(key, isa, (source, output), base, i, m, arguments))

        return kernel(symbol, body)

    return Kernel(key, (isa.name,), generate, _scalars)


def _scalars(constants: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return constants["integers"], constants["floats"]


def _interleave(
    key: OpKey,
    isa: Isa,
    buffers: tuple[tirx.Buffer, tirx.Buffer],
    base: Expr,
    first: Expr | int,
    lanes: int,
    arguments: Arguments,
) -> None:
    """Move `lanes` pixels: one shuffle of whole vectors for up to 4 channels, else element by element."""
    source, output = buffers
    _, channels, height, width = key.shapes[0]
    pixels = height * width

    def put(index: Expr, value: Expr, count: int) -> None:
        if key.dtypes[-1] == key.dtypes[0]:
            store(output, index, value, count)
            return
        value = rounded_product(value, splat(arguments.float("multiplier"), count), count)
        finish(isa, output, index, value, count, arguments, False)

    if channels > 4 or lanes == 1:
        with T.serial(0, channels) as c, T.serial(0, lanes) as i:
            put(base + (first + i) * channels + c, load(source, base + c * pixels + first + i), 1)
        return
    planes = [load(source, base + c * pixels + first, lanes) for c in range(channels)]
    order = [tirx.const(c * lanes + i, "int32") for i in range(lanes) for c in range(channels)]
    value = tirx.Shuffle(planes, order) if channels > 1 else planes[0]
    put(base + first * channels, value, lanes * channels)


def to_channels_first(key: OpKey, isa: Isa, threads: int) -> Kernel | None:
    """Describe (N, H, W, C) -> (N, C, H, W), for operators that want torch's layout; None for others."""
    if key.kind != "to_channels_first":
        return None
    n, height, width, channels = key.shapes[0]
    pixels = height * width

    def generate(symbol: str) -> tirx.PrimFunc:
        def body() -> None:
            source = T.arg("source", T.Buffer((n * channels * pixels,), key.dtypes[0]))
            output = T.arg("output", T.Buffer((n * channels * pixels,), key.dtypes[-1]))
            with T.serial(0, n) as image, T.serial(0, channels) as c, T.serial(0, pixels) as i:
                base = image * (channels * pixels)
                store(output, base + c * pixels + i, load(source, base + i * channels + c))

        return kernel(symbol, body)

    return Kernel(key, ("scalar",), generate, lambda constants: ())


def concat(key: OpKey, isa: Isa, threads: int) -> Kernel | None:
    """Describe a concatenation over the last axis, each input copied or requantized; None for others."""
    if key.kind != "concat":
        return None

    def generate(symbol: str) -> tirx.PrimFunc:
        return kernel(symbol, lambda: _concat(key, isa))

    def pack(constants: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        return constants["zero_points"], constants["multipliers"], *_scalars(constants)

    return Kernel(key, (isa.name,), generate, pack)


def _concat(key: OpKey, isa: Isa) -> None:
    total, pixels, count = key.shapes[-1][-1], int(np.prod(key.shapes[-1][:-1])), len(key.shapes) - 1
    sources = [T.arg(f"source{i}", T.Buffer((int(np.prod(key.shapes[i])),), key.dtypes[i])) for i in range(count)]
    zero_points = T.arg("zero_points", T.Buffer((count,), "int32"))
    multipliers = T.arg("multipliers", T.Buffer((count,), "float32"))
    arguments = declare_arguments()
    output = T.arg("output", T.Buffer((pixels * total,), key.dtypes[-1]))

    def mover(i: int, start: Expr, target: Expr) -> Callable[[Expr | int, int], None]:
        def move(offset: Expr | int, lanes: int) -> None:
            value = load(sources[i], start + offset, lanes)
            if key.copies[i]:
                store(output, target + offset, value, lanes)
                return
            centred = cast(cast(value, "int32", lanes) - splat(load(zero_points, i), lanes), "float32", lanes)
            value = rounded_product(centred, splat(load(multipliers, i), lanes), lanes)
            finish(isa, output, target + offset, value, lanes, arguments, False)

        return move

    with T.serial(0, pixels) as pixel:
        offset = 0
        for i in range(count):
            channels = key.shapes[i][-1]
            lanes = isa.lanes * (4 // np.dtype(key.dtypes[i]).itemsize) if key.copies[i] else isa.lanes
            for_vectors(channels, lanes, mover(i, pixel * channels, pixel * total + offset))
            offset += channels
