"""Maximum and average pooling over windows, the global average included."""

from __future__ import annotations

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cpu.epilogue import Arguments, declare_arguments, finish
from qsearch.kernels.cpu.isa import Isa
from qsearch.kernels.cpu.vectors import cast, constant, for_blocks, kernel, load, registers, rounded_product, splat, vector_type
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["pool2d"]


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
        return kernel(symbol, lambda: _pool2d(key, isa))

    return Kernel(key, (isa.name,), generate, lambda constants: (constants["integers"], constants["floats"]))


def _pool2d(key: OpKey, isa: Isa) -> None:
    (images, height, width, channels), (_, out_height, out_width, _) = key.shapes
    source = T.arg("source", T.Buffer((images * height * width * channels,), key.dtypes[0]))
    arguments = declare_arguments()
    output = T.arg("output", T.Buffer((images * out_height * out_width * channels,), key.dtypes[-1]))
    (kh, kw), (sh, sw), (top, left, _, _) = key.pool.kernel, key.pool.stride, key.pool.padding
    with T.serial(0, images) as n, T.serial(0, out_height) as y, T.serial(0, out_width) as x:
        rows = _window(y * sh - top, kh, height, any(key.pool.padding))
        cols = _window(x * sw - left, kw, width, any(key.pool.padding))
        out = ((n * out_height + y) * out_width + x) * channels

        def block(channel: Expr | int, lanes: int) -> None:
            total = _reduce(key, source, (n * height, width, channels), rows, cols, channel, lanes)
            value = _value(key, total, rows, cols, lanes, arguments)
            if key.kind == "max_pool2d":
                T.buffer_store(output, value, [tirx.Ramp(out + channel, 1, lanes) if lanes > 1 else out + channel])
            else:
                finish(isa, output, out + channel, value, lanes, arguments, key.clipped)

        for_blocks(channels, isa.lanes, block)


def _window(start: Expr, length: int, extent: int, padded: bool) -> tuple[Expr, Expr | int]:
    """(first, count) of the positions of a window that lie inside the image."""
    if not padded:
        return start, length
    first = tirx.max(start, 0)
    return first, tirx.min(start + length, extent) - first


def _reduce(
    key: OpKey,
    source: tirx.Buffer,
    extents: tuple[Expr, int, int],
    rows: tuple[Expr, Expr | int],
    cols: tuple[Expr, Expr | int],
    channel: Expr | int,
    lanes: int,
) -> Expr:
    """The maximum or sum over a window, for one block of channels."""
    first_row, width, channels = extents
    maximum, integer = key.kind == "max_pool2d", key.dtypes[0] != "float32"
    dtype = key.dtypes[0] if maximum or not integer else "int32"
    total = registers(1, vector_type(dtype, lanes))
    smallest = {"uint8": 0, "int16": -(2**15)}.get(key.dtypes[0], -3.402823466e38)
    T.buffer_store(total, constant(smallest if maximum else 0, dtype, lanes), [0])
    with T.serial(0, rows[1]) as i, T.serial(0, cols[1]) as j:
        pixel = (first_row + rows[0] + i) * width + cols[0] + j
        value = load(source, pixel * channels + channel, lanes)
        current = tirx.BufferLoad(total, [0])
        if maximum:
            T.buffer_store(total, tirx.max(current, value), [0])
        else:
            T.buffer_store(total, current + (cast(value, "int32", lanes) if integer else value), [0])
    return tirx.BufferLoad(total, [0])


def _value(
    key: OpKey, total: Expr, rows: tuple[Expr, Expr | int], cols: tuple[Expr, Expr | int], lanes: int, arguments: Arguments
) -> Expr:
    """From the window's sum to its float32 average (a maximum is left as it is)."""
    if key.kind == "max_pool2d":
        return total
    if key.dtypes[0] != "float32":
        count = tirx.Cast("int32", rows[1] * cols[1]) if isinstance(rows[1], Expr) else constant(rows[1] * cols[1], "int32")
        centred = total - splat(count * arguments.integer("a_zero_point"), lanes)
        return rounded_product(cast(centred, "float32", lanes), splat(arguments.float("multiplier"), lanes), lanes)
    if key.pool.count_include_pad or not any(key.pool.padding):
        mean = total * constant(float(np.float32(1 / np.prod(key.pool.kernel))), "float32", lanes)
    else:
        mean = total / splat(tirx.Cast("float32", rows[1] * cols[1]), lanes)
    return rounded_product(mean, splat(arguments.float("multiplier"), lanes), lanes)
