"""Translate a program: one function per kind of operation, from integers to real numbers and back.

Scales, zero points, weights and biases are the program's. What differs is where a result is rounded to float32 on its
way to an integer, so that an integer of a value may come out one step apart where it lay near the middle of two; a network
of random-looking values makes more of that, layer by layer. Integer runtimes can be brought to the program's own rounding, see
`translate`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qsearch.errors import UnsupportedModelError
from qsearch.export.interchange.memory_views import gather_runs, strided, unstrided
from qsearch.export.interchange.steps import QuantizedNetwork
from qsearch.export.interchange.writer import Rounding, Tensor, Writer, scalar
from qsearch.qtype import PRECISIONS
from qsearch.quantize.program import INTEGER_DTYPES, Op, Program

__all__ = ["translate"]


def translate(program: Program, rounding: Rounding = "float") -> QuantizedNetwork:
    """Say a program in float operators, with quantization around them.

    Args:
        program: The program.
        rounding: How an 8-bit layer comes to its integers. A runtime that fuses a layer between DequantizeLinear and
            QuantizeLinear multiplies its sum by input scale * weight scale / output scale, in float32.
            float: all in real numbers.
            fused: weight scales yield the program's multiplier, where a change of their last bits can.
            steps: values enter and leave a layer at a scale of one, and its weight scales are the program's multipliers: exact.
            sums: all 8-bit layers take integers at a scale of one and multiply the sum themselves: exact in float32 as well, as
            long as sums are below 2**24.
            In fused and steps, layers that add a residual, which no such runtime fuses, do as in sums.

    Raises:
        UnsupportedModelError: It holds something that cannot be said so; layer and operation are named.
    """
    writer = Writer(program, rounding)
    for op in program.ops:
        writer.layer = op.name
        if "float8_e4m3fn" in op.key.dtypes or op.key.kind not in _KINDS:
            what = "float8 values" if op.key.kind in _KINDS else f"operation {op.key.kind!r}"
            raise UnsupportedModelError(
                f"layer {op.name!r} has {what}, which cannot be exported to other formats: export a bundle"
            )
        _KINDS[op.key.kind](writer, op)
    writer.layer = "output"
    output = program.output
    held = writer.reshape(writer.held[output.name], output.shape)
    name = writer.step("Identity", held.name, name="output")
    given = program.input
    return QuantizedNetwork(given.name, given.shape, name, output.shape, tuple(writer.steps), writer.constants)


def _to_channels_last(writer: Writer, op: Op) -> None:
    # Images are (N, C, H, W) here as there.
    held = writer.held[op.inputs[0]]
    if op.output.dtype == "float32":
        writer.hold(op, held.name)
    else:
        writer.write(op, held.name, op.output.shape)


def _to_channels_first(writer: Writer, op: Op) -> None:
    real = writer.real(op.inputs[0], op.key.shapes[0])
    if len(op.output.shape) == 4:
        writer.hold(op, real, planar=True)
        return
    flat = writer.step("Reshape", real, shape=op.output.shape)
    writer.write(op, flat, op.output.shape, clips=False)


def _convert(writer: Writer, op: Op) -> None:
    writer.write(op, writer.real(op.inputs[0], op.key.shapes[0]), op.key.shapes[0])


def _conv2d(writer: Writer, op: Op) -> None:
    conv, shapes = op.key.conv, op.key.shapes
    # A linear layer is a convolution of one pixel here.
    linear = all(shape[1:3] == (1, 1) for shape in (shapes[0], shapes[-1])) and conv.kernel == (1, 1) and conv.groups == 1
    seen = [(shape[0], shape[3]) if linear else shape for shape in shapes]
    everywhere = writer.rounding in ("steps", "sums")
    in_steps = op.key.dtypes[0] == "uint8" and (everywhere or (writer.rounding == "fused" and op.key.residual))
    x = writer.real(op.inputs[0], seen[0], 1.0 if in_steps else None)
    weight, bias = _layer_constants(writer, op, linear, in_steps)
    if linear:
        real = writer.step("Gemm", x, weight, bias, transB=1)
    else:
        attributes: dict[str, Any] = {"kernel_shape": conv.kernel, "strides": conv.stride, "pads": conv.padding}
        attributes["dilations"] = conv.dilation
        real = writer.step("Conv", x, weight, bias, group=conv.groups, **attributes)
    if in_steps and not _fuses(writer, op):
        real = writer.step("Mul", real, writer.constant("multiplier", _per_channel(op.constants["multiplier"], linear)))
    if op.key.residual:
        residual = _residual_steps(writer, op, seen[1]) if in_steps else writer.real(op.inputs[1], seen[1])
        real = writer.step("Add", real, residual)
    if op.key.clips_channels:
        high = op.constants["clip_high"]
        if op.output.dtype in INTEGER_DTYPES and not in_steps:
            high = high * writer.affine(op.output.name).scale
        real = writer.step("Min", real, writer.constant("high", _per_channel(high, linear)))
    writer.write(op, real, seen[-1], steps=in_steps)


def _fuses(writer: Writer, op: Op) -> bool:
    """A runtime can make one integer kernel of the layer and the conversions around it."""
    return writer.rounding != "sums" and not op.key.residual and (op.key.dtypes[0], op.output.dtype) == ("uint8", "uint8")


def _residual_steps(writer: Writer, op: Op, shape: tuple[int, ...]) -> str:
    """A residual in steps of the output, rounded as the program rounds it."""
    factor = np.float32(scalar(op, "b_multiplier"))
    if op.key.dtypes[1] in INTEGER_DTYPES:
        return writer.real(op.inputs[1], shape, float(factor))
    residual = writer.real(op.inputs[1], shape)
    return residual if factor == 1 else writer.step("Mul", residual, writer.constant("residual", np.array(factor)))


def _layer_constants(writer: Writer, op: Op, linear: bool, in_steps: bool) -> tuple[str, str]:
    """Weight (O, I/groups, kh, kw) or (O, I) and bias (O,), as real numbers or as the integers that they are."""
    weight = op.constants["weight"].transpose(0, 3, 1, 2)
    weight = weight.reshape(weight.shape[:2]) if linear else weight
    bias = op.constants["bias"]
    if not PRECISIONS[op.key.precision or ""].is_integer:
        return writer.constant("weight", weight.astype(np.float32)), writer.constant("bias", bias.astype(np.float32))
    affine, scale = writer.affine(op.inputs[0]), op.constants["weight_scale"]
    # The program has folded the input's zero point into the bias.
    whole = bias.astype(np.int64) + affine.zero_point * weight.reshape(len(weight), -1).sum(1, dtype=np.int64)
    fused = _fuses(writer, op)
    if in_steps:
        scale = op.constants["multiplier"] if fused else np.ones_like(scale)
    elif fused and writer.rounding == "fused":
        scale = _fused_scale(op, scale, affine.scale, writer.affine(op.output.name).scale)
    scale = scale[0] if (scale == scale[0]).all() else scale
    bias_scale = scale if in_steps else scale * affine.scale
    names = []
    for name, integers, step in (("weight", weight, scale), ("bias", whole.astype(np.int32), bias_scale)):
        given = writer.constant(name, integers), writer.constant(f"{name}.scale", np.asarray(step, np.float32))
        names.append(writer.step("Weight", *given))
    return names[0], names[1]


def _fused_scale(op: Op, scale: np.ndarray, given: np.float32, unit: np.float32) -> np.ndarray:
    """Weight scales with which a fused kernel's multiplier, scale * given / unit in float32, is the program's own.

    They differ from the weights' scales in their last bits, if at all.
    """
    found = scale.copy()
    for step in (4, -4, 3, -3, 2, -2, 1, -1, 0):
        near = (scale.view(np.int32) + np.int32(step)).view(np.float32)
        found = np.where(near * given / unit == op.constants["multiplier"], near, found)
    return found


def _per_channel(values: np.ndarray, linear: bool) -> np.ndarray:
    return values.astype(np.float32).reshape((1, -1) if linear else (1, -1, 1, 1))


def _pointwise(operator: str) -> Callable[[Writer, Op], None]:
    def translate_pair(writer: Writer, op: Op) -> None:
        pair = (writer.real(name, shape) for name, shape in zip(op.inputs, op.key.shapes, strict=False))
        writer.write(op, writer.step(operator, *pair), op.key.shapes[-1])

    return translate_pair


def _pool(operator: str) -> Callable[[Writer, Op], None]:
    def translate_pool(writer: Writer, op: Op) -> None:
        pool, whole = op.key.pool, op.key.shapes[0]
        x = writer.real(op.inputs[0], whole)
        attributes: dict[str, Any] = {"kernel_shape": pool.kernel, "strides": pool.stride, "pads": pool.padding}
        if operator == "AveragePool":
            integer = op.key.dtypes[0] in INTEGER_DTYPES
            attributes["count_include_pad"] = int(integer or pool.count_include_pad)
        if operator == "AveragePool" and pool.kernel == whole[1:3] and not any(pool.padding):
            real = writer.step("GlobalAveragePool", x)
        else:
            real = writer.step(operator, x, **attributes)
        writer.write(op, real, op.key.shapes[-1], clips=operator == "AveragePool")

    return translate_pool


def _concat(writer: Writer, op: Op) -> None:
    inputs = [writer.real(name, shape) for name, shape in zip(op.inputs, op.key.shapes, strict=False)]
    shape = op.key.shapes[-1]
    axis = 1 if len(shape) == 4 else len(shape) - 1
    real = writer.step("Concat", *inputs, axis=axis) if len(inputs) > 1 else inputs[0]
    if op.key.channels is not None:
        real = writer.step("Gather", real, writer.constant("channels", np.array(op.key.channels, np.int64)), axis=axis)
    writer.write(op, real, shape)


def _lookup(writer: Writer, op: Op) -> None:
    given, held = op.inputs[0], writer.held[op.inputs[0]]
    table = writer.constant("table", op.constants["table"])
    written = writer.affine(op.output.name)
    name = writer.step("Lookup", held.name, table, name=op.output.name, affine=writer.affine(given), written=written)
    made = writer.reshape(Tensor(name, held.shape, held.planar), op.output.shape)
    writer.hold(op, made.name)


def _activation(writer: Writer, op: Op) -> None:
    x, function = writer.real(op.inputs[0], op.key.shapes[0]), op.key.function or ""
    if function == "silu":
        real = writer.step("Mul", x, writer.step("Sigmoid", x))
    elif function == "hardsigmoid":
        real = writer.step("HardSigmoid", x, alpha=1 / 6, beta=0.5)
    else:
        named = {"hardswish": "HardSwish", "sigmoid": "Sigmoid", "gelu": "Gelu", "tanh": "Tanh"}
        real = x if function == "clip" else writer.step(named[function], x)
    writer.write(op, real, op.key.shapes[-1])


def _matmul(writer: Writer, op: Op) -> None:
    matmul = op.key.matmul
    *batch, m, n, k = matmul.extents
    operands = []
    for name, strides, extents in ((op.inputs[0], matmul.a, (m, k)), (op.inputs[1], matmul.b, (k, n))):
        size = int(np.prod(writer.held[name].shape))
        flat = writer.real(name, (size,))
        operands.append(strided(writer, flat, size, strides[0], strides[1:], (*batch, *extents)))
    real = writer.step("MatMul", *operands)
    # The program's multiplier, brought back from integers to real numbers.
    factor = np.float64(scalar(op, "multiplier"))
    if op.key.dtypes[0] in INTEGER_DTYPES:
        factor /= np.prod([np.float64(writer.affine(name).scale) for name in op.inputs])
    if op.output.dtype in INTEGER_DTYPES:
        factor *= np.float64(writer.affine(op.output.name).scale)
    if abs(factor - 1) > 1e-6:
        real = writer.step("Mul", real, writer.constant("factor", np.array(factor, np.float32)))
    real = unstrided(writer, real, op.output.size, matmul.out[0], matmul.out[1:], (*batch, m, n))
    writer.write(op, real, (op.output.size,))


def _gather(writer: Writer, op: Op) -> None:
    size = int(np.prod(op.key.shapes[0]))
    runs = op.key.shapes[-1]
    real = gather_runs(writer, writer.real(op.inputs[0], (size,)), size, op.constants["index"], runs[-1])
    writer.write(op, real, runs, clips=False)


def _rows(writer: Writer, op: Op) -> str:
    """What a function of rows reads: two axes, so that the last one is that of the memory."""
    shape = op.key.shapes[0]
    return writer.real(op.inputs[0], (int(np.prod(shape[:-1])), shape[-1]))


def _write_rows(writer: Writer, op: Op, real: str) -> None:
    writer.write(op, real, (op.output.size // op.key.shapes[0][-1], op.key.shapes[0][-1]))


def _layer_norm(writer: Writer, op: Op) -> None:
    tables = (writer.constant(name, op.constants[name]) for name in ("weight", "shift"))
    _write_rows(writer, op, writer.step("LayerNormalization", _rows(writer, op), *tables, axis=-1, epsilon=op.key.epsilon))


def _softmax(writer: Writer, op: Op) -> None:
    length = op.key.shapes[0][-1]
    if "constant" in op.constants:
        shifted = _with_constant(writer, op, "Add")
        rows = writer.step("Reshape", shifted, shape=(op.output.size // length, length))
    else:
        rows = _rows(writer, op)
    _write_rows(writer, op, writer.step("Softmax", rows, axis=-1))


def _l2_normalize(writer: Writer, op: Op) -> None:
    x = _rows(writer, op)
    least = writer.constant("epsilon", np.array(op.key.epsilon, np.float32))
    _write_rows(writer, op, writer.step("Div", x, writer.step("Max", writer.step("RowLength", x), least)))


def _with_constant(writer: Writer, op: Op, operator: str) -> str:
    """What the operation reads, times or plus a constant that repeats over memory; shape (repeats, length)."""
    constant = op.constants["constant"]
    size = int(np.prod(op.key.shapes[0]))
    x = writer.real(op.inputs[0], (size // len(constant), len(constant)))
    return writer.step(operator, x, writer.constant("constant", constant))


def _elementwise(operator: str) -> Callable[[Writer, Op], None]:
    def translate_constant(writer: Writer, op: Op) -> None:
        length = len(op.constants["constant"])
        writer.write(op, _with_constant(writer, op, operator), (op.output.size // length, length))

    return translate_constant


def _foreign(writer: Writer, op: Op) -> None:
    assert op.key.foreign is not None
    inputs = [writer.real(name, shape) for name, shape in zip(op.inputs, op.key.shapes, strict=False)]
    parameters = [writer.constant(name, op.constants[name]) for name in op.key.foreign.parameters]
    writer.hold(op, writer.step("Foreign", *inputs, *parameters, foreign=op.key.foreign), planar=True)


_KINDS: dict[str, Callable[[Writer, Op], None]] = {
    "to_channels_last": _to_channels_last,
    "to_channels_first": _to_channels_first,
    "quantize": _convert,
    "dequantize": _convert,
    "requantize": _convert,
    "conv2d": _conv2d,
    "add": _pointwise("Add"),
    "mul": _pointwise("Mul"),
    "avg_pool2d": _pool("AveragePool"),
    "max_pool2d": _pool("MaxPool"),
    "concat": _concat,
    "lookup": _lookup,
    "activation": _activation,
    "matmul": _matmul,
    "gather": _gather,
    "layer_norm": _layer_norm,
    "softmax": _softmax,
    "l2_normalize": _l2_normalize,
    "scale": _elementwise("Mul"),
    "shift": _elementwise("Add"),
    "foreign": _foreign,
}
