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
from qsearch.export.interchange.layers import translate_layer
from qsearch.export.interchange.memory_views import gather_runs, strided, unstrided
from qsearch.export.interchange.steps import QuantizedNetwork
from qsearch.export.interchange.writer import Rounding, Tensor, Writer, scalar
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
        _write_rounded(writer, op, held.name, op.output.shape)


def _to_channels_first(writer: Writer, op: Op) -> None:
    real = writer.real(op.inputs[0], op.key.shapes[0])
    if len(op.output.shape) == 4:
        writer.hold(op, real, planar=True)
        return
    flat = writer.step("Reshape", real, shape=op.output.shape)
    writer.write(op, flat, op.output.shape, clips=False)


def _convert(writer: Writer, op: Op) -> None:
    real = writer.real(op.inputs[0], op.key.shapes[0])
    if op.key.kind == "quantize":
        _write_rounded(writer, op, real, op.key.shapes[0])
    else:
        writer.write(op, real, op.key.shapes[0])


def _write_rounded(writer: Writer, op: Op, real: str, shape: tuple[int, ...]) -> None:
    """Quantize a float value; the program multiplies where QuantizeLinear divides."""
    in_steps = op.output.dtype in INTEGER_DTYPES and writer.rounding in ("steps", "sums")
    if in_steps:
        real = writer.step("Mul", real, writer.constant("multiplier", np.array(scalar(op, "multiplier"), np.float32)))
    writer.write(op, real, shape, steps=in_steps)


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
    "conv2d": translate_layer,
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
