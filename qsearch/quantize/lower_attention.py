"""Lowering of attention's operations: strided products, moves, functions of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from qsearch.models.graph import Node
from qsearch.quantize.assign import FLOAT, FLOAT16_FORM, UINT8_FORM
from qsearch.quantize.lower_nodes import Context, _operand, _output_scalars, _unit
from qsearch.quantize.program import Op, OpKey, Value
from qsearch.quantize.scalars import scalars

__all__ = ["ATTENTION_LOWERINGS", "lower_gather"]

# Form that a matmul computes in -> its precision.
_PRODUCTS = {UINT8_FORM: "int8", FLOAT16_FORM: "fp16", FLOAT: "fp32"}
# Names of a node's constants in its operation, by kind.
_NAMES = {"layer_norm": ("weight", "shift"), "softmax": ("constant",), "scale": ("constant",), "shift": ("constant",)}


def lower_gather(context: Context, node: Node, source: Value, output: Value) -> Op:
    """Move a value in one of its forms."""
    index = context.model.parameters.constants[node.constants[0]]
    values: dict[str, float] = {}
    if output.dtype != "float32":
        values["a_zero_point"] = context.affines[node.name, output.dtype].zero_point
    shapes = (source.shape, (len(index), output.size // len(index)))
    key = OpKey("gather", shapes, (source.dtype, output.dtype), padded=bool((index < 0).any()))
    return Op(node.name, key, (source.name,), output, {"index": index} | scalars(**values))


def _matmul(context: Context, node: Node, inputs: list[Value], output: Value) -> Op:
    values = _output_scalars(context, node, output)
    multiplier = node.matmul.factor / _unit(context, node, output)
    form = context.assignment.computes[node.name]
    integer = form == UINT8_FORM
    if integer:
        for name, which in zip(node.inputs, "ab", strict=True):
            affine = context.affines[name, UINT8_FORM]
            values[f"{which}_zero_point"] = affine.zero_point
            multiplier *= float(affine.scale)
    key = OpKey(
        "matmul",
        tuple(value.shape for value in (*inputs, output)),
        tuple(value.dtype for value in (*inputs, output)),
        _PRODUCTS[form],
        matmul=replace(node.matmul, factor=1.0),
    )
    return Op(node.name, key, tuple(value.name for value in inputs), output, scalars(multiplier=multiplier, **values))


def _float_inside(context: Context, node: Node, inputs: list[Value], output: Value) -> Op:
    """A function of rows or elements: dequantized on the way in, quantized on the way out."""
    values = _output_scalars(context, node, output) | _operand(context, node, 0, inputs[0], "a", 1.0)
    names = _NAMES.get(node.op, ())
    arrays = (context.model.parameters.constants[name] for name in node.constants)
    constants: dict[str, np.ndarray] = dict(zip(names, arrays, strict=False))
    shapes = [inputs[0].shape, *(array.shape for array in constants.values()), output.shape]
    key = OpKey(node.op, tuple(shapes), (inputs[0].dtype, output.dtype), epsilon=node.epsilon)
    scalar = scalars(multiplier=1 / _unit(context, node, output), **values)
    return Op(node.name, key, (inputs[0].name,), output, constants | scalar)


ATTENTION_LOWERINGS: dict[str, Callable[[Context, Node, list[Value], Value], Op]] = {
    "matmul": _matmul,
    "layer_norm": _float_inside,
    "softmax": _float_inside,
    "l2_normalize": _float_inside,
    "scale": _float_inside,
    "shift": _float_inside,
}
