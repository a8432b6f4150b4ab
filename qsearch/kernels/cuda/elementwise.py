"""Kernels that visit every element once: conversions, addition, multiplication, activations, lookup tables."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.errors import BuildError
from qsearch.kernels.cuda.epilogue import FLOAT_DTYPES, Arguments, declare_arguments, dequantized, finished
from qsearch.kernels.cuda.simt import (
    add,
    constant,
    converted,
    for_elements,
    kernel,
    load,
    move,
    mul,
    registers,
    store,
    vector_lanes,
)
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["elementwise", "lookup", "multiply_broadcast"]

# Adjacent elements that a thread computes, at most.
MOST_LANES = 4


def elementwise(key: OpKey, arch: str) -> Kernel | None:
    """Describe a conversion, add, mul of equal shapes, or an activation in float; None for another operation."""
    if key.kind not in ("quantize", "dequantize", "requantize", "add", "mul", "activation") or len(set(key.shapes)) > 1:
        return None
    return Kernel(key, (), lambda symbol: _generate(key, symbol), _scalars)


def _scalars(constants: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return constants["integers"], constants["floats"]


def _generate(key: OpKey, symbol: str) -> tirx.PrimFunc:
    size = int(np.prod(key.shapes[0]))
    lanes = min(vector_lanes(size, *key.dtypes), MOST_LANES)

    def body() -> None:
        sources = [T.arg(f"source{i}", T.Buffer((size,), dtype)) for i, dtype in enumerate(key.dtypes[:-1])]
        arguments = declare_arguments()
        output = T.arg("output", T.Buffer((size,), key.dtypes[-1]))

        def group(offset: Expr) -> None:
            given = [registers(lanes, dtype) for dtype in key.dtypes[:-1]]
            made = registers(lanes, key.dtypes[-1])
            for source, kept in zip(sources, given, strict=True):
                move(kept, 0, source, offset, lanes)
            for i in range(lanes):
                value = _value(key, [load(kept, i) for kept in given], arguments)
                store(made, i, finished(key.dtypes[-1], value, arguments, key.clipped))
            move(output, offset, made, 0, lanes)

        for_elements(size, lanes, group)

    return kernel(symbol, body)


def _value(key: OpKey, values: list[Expr], arguments: Arguments) -> Expr:
    """The operation on one element, as float32 before clipping and rounding."""
    if key.kind == "quantize":
        return mul(converted(values[0], "float32"), arguments.float("multiplier"))
    if key.kind in ("dequantize", "requantize"):
        return dequantized(values[0], key.dtypes[0], arguments, "a")
    if key.kind == "add":
        a, b = (dequantized(v, key.dtypes[i], arguments, "ab"[i]) for i, v in enumerate(values))
        return add(a, b)
    if key.kind == "mul":
        return product(key, values, arguments)
    floating = key.dtypes[0] in FLOAT_DTYPES
    x = converted(values[0], "float32") if floating else dequantized(values[0], key.dtypes[0], arguments, "a")
    value = _activation(key.function or "", x)
    if floating and key.dtypes[-1] in FLOAT_DTYPES:
        return value
    return mul(value, arguments.float("multiplier"))


def product(key: OpKey, values: list[Expr], arguments: Arguments) -> Expr:
    """(a - a_zero_point) * (b - b_zero_point), or a * b of float values, times the multiplier."""
    if key.dtypes[0] in FLOAT_DTYPES:
        both = mul(*(converted(value, "float32") for value in values))
    else:
        a, b = (converted(v, "int32") - arguments.integer(f"{w}_zero_point") for v, w in zip(values, "ab", strict=True))
        both = converted(a * b, "float32")
    return mul(both, arguments.float("multiplier"))


def _activation(function: str, x: Expr) -> Expr:
    """A pointwise function of float32; 'clip' is left to the epilogue."""
    one = constant(1.0, "float32")
    sigmoid: Callable[[], Expr] = lambda: one / (one + tirx.exp(constant(0.0, "float32") - x))  # noqa: E731
    if function == "clip":
        return x
    if function in ("hardswish", "hardsigmoid"):
        gate = tirx.min(tirx.max(x + constant(3.0, "float32"), constant(0.0, "float32")), constant(6.0, "float32"))
        gate = gate * constant(1 / 6, "float32")
        return gate * x if function == "hardswish" else gate
    if function == "gelu":
        return x * constant(0.5, "float32") * (one + tirx.erf(x * constant(0.5**0.5, "float32")))
    if function == "tanh":
        return tirx.tanh(x)
    if function in ("silu", "sigmoid"):
        return x * sigmoid() if function == "silu" else sigmoid()
    raise BuildError(f"no CUDA kernel for the function {function!r}; this is a gap in qsearch's kernel set")


def lookup(key: OpKey, arch: str) -> Kernel | None:
    """Describe a 256-entry table lookup, q = table[a]; None for another operation."""
    if key.kind != "lookup":
        return None
    size = int(np.prod(key.shapes[0]))
    lanes = min(vector_lanes(size, "uint8"), MOST_LANES)

    def body() -> None:
        source = T.arg("source", T.Buffer((size,), "uint8"))
        table = T.arg("table", T.Buffer((256,), "uint8"))
        output = T.arg("output", T.Buffer((size,), "uint8"))

        def group(offset: Expr) -> None:
            given, made = registers(lanes, "uint8"), registers(lanes, "uint8")
            move(given, 0, source, offset, lanes)
            for i in range(lanes):
                store(made, i, load(table, converted(load(given, i), "int32")))
            move(output, offset, made, 0, lanes)

        for_elements(size, lanes, group)

    return Kernel(key, (), lambda symbol: kernel(symbol, body), lambda constants: (constants["table"],))


def multiply_broadcast(key: OpKey, arch: str) -> Kernel | None:
    """Describe mul of (N, H, W, C) by (N, 1, 1, C), the gate of a squeeze-excite block; None for others."""
    if key.kind != "mul" or len(key.shapes[0]) != 4 or key.shapes[0] != key.shapes[-1]:
        return None
    n, height, width, channels = key.shapes[0]
    if key.shapes[1] != (n, 1, 1, channels):
        return None
    size = int(np.prod(key.shapes[0]))
    lanes = min(vector_lanes(channels, *key.dtypes), MOST_LANES)

    def body() -> None:
        source = T.arg("source", T.Buffer((size,), key.dtypes[0]))
        gate = T.arg("gate", T.Buffer((n * channels,), key.dtypes[1]))
        arguments = declare_arguments()
        output = T.arg("output", T.Buffer((size,), key.dtypes[-1]))

        def group(offset: Expr) -> None:
            given, factors = registers(lanes, key.dtypes[0]), registers(lanes, key.dtypes[1])
            made = registers(lanes, key.dtypes[-1])
            move(given, 0, source, offset, lanes)
            image, channel = offset // (height * width * channels), offset % channels
            move(factors, 0, gate, image * channels + channel, lanes)
            for i in range(lanes):
                value = product(key, [load(given, i), load(factors, i)], arguments)
                store(made, i, finished(key.dtypes[-1], value, arguments, key.clipped))
            move(output, offset, made, 0, lanes)

        for_elements(size, lanes, group)

    return Kernel(key, (), lambda symbol: kernel(symbol, body), _scalars)
