"""The NumPy reference: what every integer operation of a program computes, bit for bit.

Slow and plain on purpose. The arithmetic is written down in `qsearch.quantize.program`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qsearch.models.graph import Pool
from qsearch.qtype import FLOAT8, FLOAT16, PRECISIONS, UNSCALED
from qsearch.quantize.program import FLOATS, INTEGER_DTYPES, INTEGERS, Op, Program
from qsearch.quantize.reference_attention import FLOAT_FUNCTIONS, gather, multiply

__all__ = ["activation", "run_op", "run_program"]

Array = np.ndarray
Foreign = Callable[[Op, list[Array]], Array]


def run_program(program: Program, image: Array, foreign: Foreign | None = None) -> dict[str, Array]:
    """Execute a program.

    Args:
        program: The program.
        image: float32 (N, C, H, W), as the program's input says.
        foreign: Computes operations that are not qsearch's own.

    Returns:
        Value name -> array in its physical shape, for every value.
    """
    values = {program.input.name: image}
    for op in program.ops:
        values[op.output.name] = run_op(op, [values[name] for name in op.inputs], foreign)
    return values


def run_op(op: Op, inputs: list[Array], foreign: Foreign | None = None) -> Array:
    """Execute one operation on physical arrays."""
    if op.key.kind == "foreign":
        if foreign is None:
            raise ValueError(f"{op.name} is foreign and no function to compute it was given")
        return foreign(op, inputs)
    shaped = [value.reshape(shape) for value, shape in zip(inputs, op.key.shapes, strict=False)]
    result = _KINDS[op.key.kind](op, shaped)
    return result.reshape(op.output.shape).astype(op.output.dtype, copy=False)


def _integer(op: Op, name: str) -> int:
    return int(op.constants["integers"][INTEGERS.index(name)])


def _float(op: Op, name: str) -> np.float32:
    return np.float32(op.constants["floats"][FLOATS.index(name)])


def _finish(op: Op, value: Array) -> Array:
    """float32 -> the output: clip(rint(value) + zero_point, qmin, qmax), or clip(value, low, high)."""
    if op.output.dtype in INTEGER_DTYPES:
        whole = np.rint(value).astype(np.float64) + _integer(op, "zero_point")
        return np.clip(whole, _integer(op, "qmin"), _integer(op, "qmax")).astype(op.output.dtype)
    value = np.clip(value, _float(op, "low"), _float(op, "high")) if op.key.clipped else value
    if op.output.dtype == "float32":
        return value
    limits = FLOAT16 if op.output.dtype == "float16" else FLOAT8
    return np.clip(value, limits.qmin, limits.qmax).astype(limits.dtype)


def _is_integer(value: Array) -> bool:
    return value.dtype.name in INTEGER_DTYPES


def _dequantized(op: Op, value: Array, which: str) -> Array:
    if _is_integer(value):
        value = value.astype(np.int32) - _integer(op, f"{which}_zero_point")
    return value.astype(np.float32) * _float(op, f"{which}_multiplier")


def _conv2d(op: Op, inputs: list[Array]) -> Array:
    integer = PRECISIONS[op.key.precision or ""].is_integer
    fill = _integer(op, "a_zero_point") if integer else 0
    # float64 holds every partial sum of integer products exactly (below 2**31), and uses BLAS.
    total = _convolve(inputs[0], op.constants["weight"], op, fill)
    if integer:
        accumulated = total.astype(np.int64) + op.constants["bias"]
        value = accumulated.astype(np.int32).astype(np.float32) * op.constants["multiplier"]
    elif op.key.precision == "fp8":
        value = total.astype(np.float32) * op.constants["multiplier"] + op.constants["bias"]
    else:
        value = (total + op.constants["bias"]).astype(np.float32)
    if op.key.residual:
        value = value + _dequantized(op, inputs[1], "b")
    if op.key.precision in UNSCALED and op.output.dtype not in ("float32", "float16"):
        value = value * _float(op, "multiplier")
    if op.key.clips_channels:
        value = np.minimum(value, op.constants["clip_high"])
    return _finish(op, value)


def _convolve(x: Array, weight: Array, op: Op, fill: int) -> Array:
    """(N, H, W, C) * (O, kh, kw, C/groups) -> float64 (N, OH, OW, O)."""
    conv, (n, out_h, out_w, out_channels) = op.key.conv, op.key.shapes[-1]
    top, left, bottom, right = conv.padding
    padded = np.pad(x.astype(np.float64), ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=fill)
    grouped = padded.reshape(*padded.shape[:3], conv.groups, -1)
    kernels = weight.reshape(conv.groups, -1, *weight.shape[1:]).astype(np.float64)
    total = np.zeros((n, out_h, out_w, conv.groups, out_channels // conv.groups))
    for kh in range(conv.kernel[0]):
        for kw in range(conv.kernel[1]):
            y, x0 = kh * conv.dilation[0], kw * conv.dilation[1]
            window = grouped[:, y : y + (out_h - 1) * conv.stride[0] + 1 : conv.stride[0]]
            window = window[:, :, x0 : x0 + (out_w - 1) * conv.stride[1] + 1 : conv.stride[1]]
            total += np.einsum("nhwgi,goi->nhwgo", window, kernels[:, :, kh, kw], optimize=True)
    return total.reshape(n, out_h, out_w, out_channels)


def _quantize(op: Op, inputs: list[Array]) -> Array:
    return _finish(op, inputs[0] * _float(op, "multiplier"))


def _dequantize(op: Op, inputs: list[Array]) -> Array:
    return _finish(op, _dequantized(op, inputs[0], "a"))


def _to_channels_last(op: Op, inputs: list[Array]) -> Array:
    moved = inputs[0].transpose(0, 2, 3, 1)
    return _quantize(op, [moved]) if op.output.dtype != moved.dtype else moved


def _to_channels_first(op: Op, inputs: list[Array]) -> Array:
    return inputs[0].transpose(0, 3, 1, 2)


def _add(op: Op, inputs: list[Array]) -> Array:
    return _finish(op, _dequantized(op, inputs[0], "a") + _dequantized(op, inputs[1], "b"))


def _mul(op: Op, inputs: list[Array]) -> Array:
    if not _is_integer(inputs[0]):
        return _finish(op, inputs[0].astype(np.float32) * inputs[1].astype(np.float32) * _float(op, "multiplier"))
    a, b = (x.astype(np.int32) - _integer(op, f"{w}_zero_point") for x, w in zip(inputs, "ab", strict=True))
    return _finish(op, (a * b).astype(np.float32) * _float(op, "multiplier"))


def _windows(x: Array, pool: Pool, out: tuple[int, ...], fill: float) -> Array:
    """(N, H, W, C) -> (kh * kw, N, OH, OW, C)."""
    top, left, bottom, right = pool.padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=fill)
    taps = []
    for kh in range(pool.kernel[0]):
        for kw in range(pool.kernel[1]):
            rows = slice(kh, kh + (out[1] - 1) * pool.stride[0] + 1, pool.stride[0])
            taps.append(padded[:, rows, kw : kw + (out[2] - 1) * pool.stride[1] + 1 : pool.stride[1]])
    return np.stack(taps)


def _max_pool2d(op: Op, inputs: list[Array]) -> Array:
    fill = np.iinfo(inputs[0].dtype).min if _is_integer(inputs[0]) else -np.inf
    return _windows(inputs[0], op.key.pool, op.output.shape, fill).max(0)


def _avg_pool2d(op: Op, inputs: list[Array]) -> Array:
    pool = op.key.pool
    if _is_integer(inputs[0]):
        zero_point = _integer(op, "a_zero_point")
        total = _windows(inputs[0].astype(np.int32), pool, op.output.shape, zero_point).sum(0, dtype=np.int32)
        total = total - pool.kernel[0] * pool.kernel[1] * zero_point
        return _finish(op, total.astype(np.float32) * _float(op, "multiplier"))
    x = inputs[0].astype(np.float32)
    counted = np.ones_like(x) if not pool.count_include_pad else None
    total = _windows(x, pool, op.output.shape, 0.0).sum(0)
    if counted is None:
        mean = total * np.float32(1 / (pool.kernel[0] * pool.kernel[1]))
    else:
        mean = total / _windows(counted, pool, op.output.shape, 0.0).sum(0)
    return _finish(op, mean * _float(op, "multiplier"))


def _concat(op: Op, inputs: list[Array]) -> Array:
    parts = []
    for i, value in enumerate(inputs):
        if not op.key.copies[i]:
            centred = value.astype(np.int32) - op.constants["zero_points"][i]
            value = _finish(op, centred.astype(np.float32) * op.constants["multipliers"][i])
        parts.append(value)
    joined = np.concatenate(parts, axis=-1)
    return joined if op.key.channels is None else joined[..., list(op.key.channels)]


def _lookup(op: Op, inputs: list[Array]) -> Array:
    return op.constants["table"][inputs[0]]


def _pixels(op: Op, inputs: list[Array]) -> Array:
    return op.constants["table"][inputs[0], np.arange(inputs[0].shape[-1])]


def _argmax(op: Op, inputs: list[Array]) -> Array:
    return inputs[0].argmax(-1).astype(np.int32)


def _matmul(op: Op, inputs: list[Array]) -> Array:
    integer = op.key.precision == "int8"
    given = list(inputs)
    if integer:
        given = [x.astype(np.int32) - _integer(op, f"{which}_zero_point") for x, which in zip(inputs, "ab", strict=True)]
    # float64 holds the integer sums exactly.
    total = multiply(op.key.matmul, *(x.astype(np.float64) for x in given)).reshape(op.output.shape)
    return _finish(op, total.astype(np.float32) * _float(op, "multiplier"))


def _gather(op: Op, inputs: list[Array]) -> Array:
    fill = _integer(op, "a_zero_point") if _is_integer(inputs[0]) else 0
    return gather(inputs[0].ravel(), op.constants["index"], op.key.shapes[-1], fill)


def _float_inside(op: Op, inputs: list[Array]) -> Array:
    value = FLOAT_FUNCTIONS[op.key.kind](op, _dequantized(op, inputs[0], "a"))
    return _finish(op, value * _float(op, "multiplier"))


def activation(function: str, x: Array) -> Array:
    """A pointwise function in float64, returned as float32: the definition of lookup tables."""
    x = x.astype(np.float64)
    return _FUNCTIONS[function](x).astype(np.float32)


def _activation(op: Op, inputs: list[Array]) -> Array:
    x = _dequantized(op, inputs[0], "a")
    value = x if op.key.function == "clip" else activation(op.key.function or "", x)
    return _finish(op, value * _float(op, "multiplier"))


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _erf(x: Array) -> Array:
    from math import erf

    return np.vectorize(erf, otypes=[np.float64])(x)


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hardsigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: x * (1 + _erf(x / np.sqrt(2))) / 2,
    "tanh": np.tanh,
}

_KINDS: dict[str, Callable[[Op, list[Array]], Array]] = {
    "to_channels_last": _to_channels_last,
    "to_channels_first": _to_channels_first,
    "quantize": _quantize,
    "dequantize": _dequantize,
    "requantize": _dequantize,
    "conv2d": _conv2d,
    "add": _add,
    "mul": _mul,
    "avg_pool2d": _avg_pool2d,
    "max_pool2d": _max_pool2d,
    "concat": _concat,
    "lookup": _lookup,
    "pixels": _pixels,
    "argmax": _argmax,
    "activation": _activation,
    "matmul": _matmul,
    "gather": _gather,
    **dict.fromkeys(FLOAT_FUNCTIONS, _float_inside),
}
