"""Functions that always compute in float32: softmax, layer norm and normalisation of rows, scales and shifts.

Integer and float16 inputs are converted while they are read, such outputs while they are written.
"""

from __future__ import annotations

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cuda.epilogue import FLOAT_DTYPES, Arguments, declare_arguments, dequantized, finished
from qsearch.kernels.cuda.row_blocks import Element, RowBlocks, RowWriter
from qsearch.kernels.cuda.simt import add, constant, grid, kernel, load, mul, registers, store, vector_lanes
from qsearch.kernels.cuda.vectors import fetched, items, put
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["rows"]

# What each kind reads beside its input, in argument order.
_CONSTANTS = {
    "layer_norm": ("weight", "shift"),
    "softmax": ("constant",),
    "l2_normalize": (),
    "scale": ("constant",),
    "shift": ("constant",),
}
MOST_LANES = 4
LEAST = -3.402823466e38


def rows(key: OpKey, arch: str) -> Kernel | None:
    """Describe softmax, layer_norm, l2_normalize, scale or shift; None for another operation.

    Args:
        key: shapes (input, constants..., output); the last axis is a row.
        arch: Architecture.
    """
    if key.kind not in _CONSTANTS:
        return None
    names = _CONSTANTS[key.kind][: len(key.shapes) - 2]

    def pack(constants: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        return (*(constants[name].astype(np.float32) for name in names), constants["integers"], constants["floats"])

    def body() -> None:
        size = int(np.prod(key.shapes[0]))
        source = T.arg("source", T.Buffer((size,), key.dtypes[0]))
        constants = [T.arg(f"constant{i}", T.Buffer(shape, "float32")) for i, shape in enumerate(key.shapes[1:-1])]
        arguments = declare_arguments()
        function = _Function(key, source, constants, arguments, T.arg("output", T.Buffer((size,), key.dtypes[-1])))
        if key.kind in ("scale", "shift"):
            function.pointwise()
        else:
            function.by_rows()

    return Kernel(key, (), lambda symbol: kernel(symbol, body), pack)


class _Function:
    """The kernel's arguments, and what it computes with them."""

    def __init__(
        self, key: OpKey, source: tirx.Buffer, constants: list[tirx.Buffer], arguments: Arguments, output: tirx.Buffer
    ) -> None:
        self.key, self.source, self.constants, self.arguments, self.output = key, source, constants, arguments, output

    def _read(self, value: Expr) -> Expr:
        """An element of the input as float32."""
        return dequantized(value, self.key.dtypes[0], self.arguments, "a")

    def _written(self, value: Expr) -> Expr:
        """A float32 value as the output holds it."""
        dtype = self.key.dtypes[-1]
        if dtype not in FLOAT_DTYPES:
            value = mul(value, self.arguments.float("multiplier"))
        return finished(dtype, value, self.arguments, self.key.clipped)

    def pointwise(self) -> None:
        """A scale or shift by one number, or by an array again and again."""
        size, period = int(np.prod(self.key.shapes[0])), self.key.shapes[1][0]
        lanes = min(vector_lanes(size if period == 1 else period, *self.key.dtypes), MOST_LANES)
        operation = mul if self.key.kind == "scale" else add
        with items(size // lanes) as item:
            given, made = fetched(self.source, item * lanes, lanes), registers(lanes, self.key.dtypes[-1])
            table = self.constants[0]
            held = table if period == 1 else fetched(table, item % (period // lanes) * lanes, lanes)
            for i in range(lanes):
                value = operation(self._read(load(given, i)), load(held, 0 if period == 1 else i))
                store(made, i, self._written(value))
            put(self.output, item * lanes, made, lanes)

    def by_rows(self) -> None:
        """Softmax, layer norm or normalisation."""
        count, length = int(np.prod(self.key.shapes[0][:-1])), self.key.shapes[0][-1]
        plan = RowBlocks(count, length)
        with grid(plan.blocks, plan.threads) as (block, thread):
            row = RowWriter(plan, block, thread)
            {"softmax": self._softmax, "layer_norm": self._layer_norm, "l2_normalize": self._l2_normalize}[self.key.kind](row)

    def _softmax(self, row: RowWriter) -> None:
        """exp(x - max) over its sum."""

        def given(i: Expr | int) -> Expr:
            x = self._read(load(self.source, row.base + row.place(i)))
            if self.constants:
                period = self.key.shapes[1][0]
                x = x + load(self.constants[0], (row.base + row.place(i)) % period)
            return x

        x = row.kept(given)
        largest = row.reduced(x, tirx.max, LEAST)
        power = row.kept(lambda i: tirx.exp(x(i) - largest))
        inverse = row.scalar(constant(1.0, "float32") / row.reduced(power, lambda a, b: a + b, 0.0))
        self._write(row, lambda i: power(i) * inverse)

    def _layer_norm(self, row: RowWriter) -> None:
        """(x - mean) / sqrt(variance + epsilon) * weight + shift; the variance is summed about the mean."""
        size, (weight, shift) = constant(1.0 / row.plan.length, "float32"), self.constants
        x = row.kept(lambda i: self._read(load(self.source, row.base + row.place(i))))
        mean = row.scalar(row.reduced(x, lambda a, b: a + b, 0.0) * size)
        centred = row.kept(lambda i: x(i) - mean)
        variance = row.reduced(lambda i: centred(i) * centred(i), lambda a, b: a + b, 0.0) * size
        inverse = row.scalar(constant(1.0, "float32") / tirx.sqrt(variance + constant(self.key.epsilon, "float32")))
        self._write(row, lambda i: centred(i) * inverse * load(weight, row.place(i)) + load(shift, row.place(i)))

    def _l2_normalize(self, row: RowWriter) -> None:
        """Divide by max(|x|, epsilon)."""
        x = row.kept(lambda i: self._read(load(self.source, row.base + row.place(i))))
        length = tirx.sqrt(row.reduced(lambda i: x(i) * x(i), lambda a, b: a + b, 0.0))
        inverse = row.scalar(constant(1.0, "float32") / tirx.max(length, constant(self.key.epsilon, "float32")))
        self._write(row, lambda i: x(i) * inverse)

    def _write(self, row: RowWriter, value: Element) -> None:
        row.each_existing(lambda i: store(self.output, row.base + row.place(i), self._written(value(i))))
