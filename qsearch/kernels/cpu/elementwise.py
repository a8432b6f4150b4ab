"""Kernels that visit every element once: conversions, addition, multiplication, activations, lookup tables."""

from __future__ import annotations

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.errors import BuildError
from qsearch.kernels.cpu.epilogue import Arguments, declare_arguments, dequantized, finish
from qsearch.kernels.cpu.isa import Isa
from qsearch.kernels.cpu.math import normal_cdf, sigmoid, tanh
from qsearch.kernels.cpu.vectors import (
    SHARED_ELEMENTS,
    cast,
    constant,
    for_overlapping,
    for_vectors,
    kernel,
    load,
    loop,
    rounded_product,
    splat,
    store,
)
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["elementwise", "lookup", "multiply_broadcast"]


def elementwise(key: OpKey, isa: Isa, threads: int) -> Kernel | None:
    """Describe a conversion, add, mul of equal shapes, or an activation in float; None for another operation."""
    if key.kind not in ("quantize", "dequantize", "requantize", "add", "mul", "activation") or len(set(key.shapes)) > 1:
        return None
    return Kernel(key, (isa.name,), lambda symbol: _generate(key, isa, threads, symbol), _scalars)


def _scalars(constants: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return constants["integers"], constants["floats"]


def _generate(key: OpKey, isa: Isa, threads: int, symbol: str) -> tirx.PrimFunc:
    size = int(np.prod(key.shapes[0]))

    def body() -> None:
        sources = [T.arg(f"source{i}", T.Buffer((size,), dtype)) for i, dtype in enumerate(key.dtypes[:-1])]
        arguments = declare_arguments()
        output = T.arg("output", T.Buffer((size,), key.dtypes[-1]))

        def vector(index: Expr | int, lanes: int) -> None:
            values = [load(source, index, lanes) for source in sources]
            finish(isa, output, index, _value(key, values, lanes, arguments), lanes, arguments, key.clipped)

        for_vectors(size, isa.lanes, vector, threads if size > SHARED_ELEMENTS else 1)

    return kernel(symbol, body)


def _value(key: OpKey, values: list[Expr], lanes: int, arguments: Arguments) -> Expr:
    """The operation on one vector, as float32 before clipping and rounding."""
    if key.kind == "quantize":
        return rounded_product(values[0], splat(arguments.float("multiplier"), lanes), lanes)
    if key.kind in ("dequantize", "requantize"):
        return dequantized(values[0], key.dtypes[0], lanes, arguments, "a")
    if key.kind == "add":
        a, b = (dequantized(v, key.dtypes[i], lanes, arguments, "ab"[i]) for i, v in enumerate(values))
        return a + b
    if key.kind == "mul":
        return _product(key, values, lanes, arguments)
    floating = key.dtypes[0] == "float32"
    x = values[0] if floating else dequantized(values[0], key.dtypes[0], lanes, arguments, "a")
    value = _activation(key.function or "", x, lanes)
    if floating and key.dtypes[-1] == "float32":
        return value
    return rounded_product(value, splat(arguments.float("multiplier"), lanes), lanes)


def _product(key: OpKey, values: list[Expr], lanes: int, arguments: Arguments) -> Expr:
    """(a - a_zero_point) * (b - b_zero_point), or a * b of float32 values, times the multiplier.

    The product of two centred bytes fits 17 bits, so that float32 holds it exactly, and multiplies it faster.
    """
    if key.dtypes[0] == "int16":
        product = cast(cast(values[0], "int32", lanes) * cast(values[1], "int32", lanes), "float32", lanes)
        return rounded_product(product, splat(arguments.float("multiplier"), lanes), lanes)
    if key.dtypes[0] == "uint8":
        zero_points = (splat(arguments.integer(f"{which}_zero_point"), lanes) for which in "ab")
        values = [cast(cast(v, "int32", lanes) - z, "float32", lanes) for v, z in zip(values, zero_points, strict=True)]
    product = rounded_product(values[0], values[1], lanes)
    return rounded_product(product, splat(arguments.float("multiplier"), lanes), lanes)


def _activation(function: str, x: Expr, lanes: int) -> Expr:
    """A pointwise function of float32; 'clip' is left to the epilogue."""

    def number(value: float) -> Expr:
        return constant(value, "float32", lanes)

    if function == "clip":
        return x
    if function in ("hardswish", "hardsigmoid"):
        gate = tirx.min(tirx.max(x + number(3.0), number(0.0)), number(6.0)) * number(1 / 6)
        return gate * x if function == "hardswish" else gate
    if function == "gelu":
        return x * normal_cdf(x, lanes)
    if function == "tanh":
        return tanh(x, lanes)
    if function in ("silu", "sigmoid"):
        return x * sigmoid(x, lanes) if function == "silu" else sigmoid(x, lanes)
    raise BuildError(f"no CPU kernel for the function {function!r}; this is a gap in qsearch's kernel set")


def lookup(key: OpKey, isa: Isa, threads: int) -> Kernel | None:
    """Describe a 256-entry table lookup, q = table[a]; None for another operation."""
    if key.kind != "lookup":
        return None

    def generate(symbol: str) -> tirx.PrimFunc:
        return kernel(symbol, lambda: _lookup(int(np.prod(key.shapes[0])), isa, threads))

    return Kernel(key, (isa.name,), generate, lambda constants: (constants["table"],))


def _lookup(size: int, isa: Isa, threads: int) -> None:
    source = T.arg("source", T.Buffer((size,), "uint8"))
    table = T.arg("table", T.Buffer((256,), "uint8"))
    output = T.arg("output", T.Buffer((size,), "uint8"))
    whole = size // 64 if isa.permutes_bytes else 0
    if whole:
        # Two 128-byte permutations, one per half of the table; the index's top bit chooses.
        quarters = [load(table, 64 * i, 64) for i in range(4)]
        with loop(whole, threads if size > SHARED_ELEMENTS else 1) as i:
            values = load(source, i * 64, 64)
            low, high = (isa.permute_bytes(quarters[half], values, quarters[half + 1]) for half in (0, 2))
            store(output, i * 64, tirx.Select(values < constant(128, "uint8", 64), low, high), 64)
    with T.serial(0, size - 64 * whole) as i:
        store(output, 64 * whole + i, load(table, cast(load(source, 64 * whole + i), "int32", 1)))


def multiply_broadcast(key: OpKey, isa: Isa, threads: int) -> Kernel | None:
    """Describe mul of (N, H, W, C) by (N, 1, 1, C), the gate of a squeeze-excite block; None for others."""
    if key.kind != "mul" or len(key.shapes[0]) != 4 or key.shapes[0] != key.shapes[-1]:
        return None
    n, height, width, channels = key.shapes[0]
    if key.shapes[1] != (n, 1, 1, channels):
        return None

    def generate(symbol: str) -> tirx.PrimFunc:
        def body() -> None:
            source = T.arg("source", T.Buffer((n * height * width * channels,), key.dtypes[0]))
            gate = T.arg("gate", T.Buffer((n * channels,), key.dtypes[1]))
            arguments = declare_arguments()
            output = T.arg("output", T.Buffer((n * height * width * channels,), key.dtypes[-1]))
            pixels = height * width
            with loop(n * pixels, threads if n * pixels * channels > SHARED_ELEMENTS else 1) as pixel:
                base, factors = pixel * channels, pixel // pixels * channels

                def vector(index: Expr | int, lanes: int) -> None:
                    values = [load(source, base + index, lanes), load(gate, factors + index, lanes)]
                    finish(isa, output, base + index, _product(key, values, lanes, arguments), lanes, arguments, key.clipped)

                for_overlapping(channels, isa.lanes, vector)

        return kernel(symbol, body)

    return Kernel(key, (isa.name,), generate, _scalars)
