"""Functions that always compute in float32: softmax, layer norm and normalisation of rows, scales and shifts.

A uint8 input is dequantized while it is read, a uint8 output quantized while it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cpu.epilogue import Arguments, declare_arguments, dequantized, finish
from qsearch.kernels.cpu.isa import Isa
from qsearch.kernels.cpu.math import exp
from qsearch.kernels.cpu.reduce import horizontal
from qsearch.kernels.cpu.vectors import (
    SHARED_ELEMENTS,
    constant,
    for_vectors,
    kernel,
    load,
    loop,
    registers,
    rounded_product,
    splat,
    store,
    vector_type,
)
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
# Vectors reduced at a time, so that one addition need not wait for the one before.
ACCUMULATORS = 4


def rows(key: OpKey, isa: Isa, threads: int) -> Kernel | None:
    """Describe softmax, layer_norm, l2_normalize, scale or shift; None for another operation.

    Args:
        key: shapes (input, constants..., output); the last axis is a row.
        isa: Instruction set.
        threads: Threads to share the rows between.
    """
    if key.kind not in _CONSTANTS:
        return None
    names = _CONSTANTS[key.kind][: len(key.shapes) - 2]
    shared = threads if int(np.prod(key.shapes[0])) > SHARED_ELEMENTS else 1
    plan = _Plan(key, isa, shared)

    def pack(constants: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        return (*(constants[name].astype(np.float32) for name in names), constants["integers"], constants["floats"])

    scratch = 0 if plan.pointwise else shared * plan.row * 4
    return Kernel(key, (isa.name, shared), lambda symbol: kernel(symbol, plan.write), pack, scratch)


@dataclass(frozen=True)
class _Buffers:
    """The kernel's arguments."""

    source: tirx.Buffer
    constants: list[tirx.Buffer]
    arguments: Arguments
    output: tirx.Buffer


@dataclass(frozen=True)
class _Plan:
    """Static numbers of one kernel."""

    key: OpKey
    isa: Isa
    threads: int

    @property
    def pointwise(self) -> bool:
        """True for a scale or shift, which needs no scratch row."""
        return self.key.kind in ("scale", "shift")

    @property
    def row(self) -> int:
        """Elements of a row; a scale or shift has rows as long as its constant."""
        return self.key.shapes[1][0] if self.pointwise else self.key.shapes[0][-1]

    def write(self) -> None:
        """Declare the arguments and visit the rows, in one chunk per share of the work."""
        key = self.key
        size = int(np.prod(key.shapes[0]))
        source = T.arg("source", T.Buffer((size,), key.dtypes[0]))
        constants = [T.arg(f"constant{i}", T.Buffer(shape, "float32")) for i, shape in enumerate(key.shapes[1:-1])]
        arguments = declare_arguments()
        buffers = _Buffers(source, constants, arguments, T.arg("output", T.Buffer((size,), key.dtypes[-1])))
        if self.pointwise and self.row == 1:
            for_vectors(size, self.isa.lanes, lambda i, lanes: self._element(buffers, i, None, lanes), self.threads)
            return
        count = size // self.row
        share = -(-count // (4 * self.threads)) if self.threads > 1 else count
        with loop(-(-count // share), self.threads) as chunk:
            writer = _RowWriter(self, buffers)
            with T.serial(0, tirx.min(share, count - chunk * share) if count % share else share) as i:
                writer.write((chunk * share + i) * self.row)

    def _element(self, buffers: _Buffers, index: Expr | int, place: Expr | int | None, lanes: int) -> None:
        """One vector of a scale or shift; the constant is one number where `place` is None."""
        x = dequantized(load(buffers.source, index, lanes), self.key.dtypes[0], lanes, buffers.arguments, "a")
        table = buffers.constants[0]
        c = splat(load(table, 0), lanes) if place is None else load(table, place, lanes)
        self.store(buffers, index, rounded_product(x, c, lanes) if self.key.kind == "scale" else x + c, lanes)

    def store(self, buffers: _Buffers, index: Expr | int, value: Expr, lanes: int) -> None:
        """Store float32 values, quantized where the output is uint8."""
        if self.key.dtypes[-1] == "uint8":
            value = rounded_product(value, splat(buffers.arguments.float("multiplier"), lanes), lanes)
        finish(self.isa, buffers.output, index, value, lanes, buffers.arguments, self.key.clipped)


class _RowWriter:
    """Writes the statements that compute one row; its scratch row belongs to one thread."""

    def __init__(self, plan: _Plan, buffers: _Buffers) -> None:
        self.plan, self.buffers = plan, buffers
        self.scratch = None
        if not plan.pointwise:
            self.scratch = T.alloc_buffer((plan.row,), "float32", scope="global", layout=None, align=64)

    def write(self, base: Expr | int) -> None:
        """The row that starts at element `base`."""
        plan, kind = self.plan, self.plan.key.kind
        if plan.pointwise:
            for_vectors(plan.row, plan.isa.lanes, lambda i, n: plan._element(self.buffers, base + i, i, n))
        else:
            {"softmax": self._softmax, "layer_norm": self._layer_norm, "l2_normalize": self._l2_normalize}[kind](base)

    def _input(self, base: Expr | int) -> Callable[[Expr | int, int], Expr]:
        """Reads the input as float32 and leaves it in the scratch row; a softmax's constant is added."""
        key, buffers = self.plan.key, self.buffers

        def read(i: Expr | int, lanes: int) -> Expr:
            x = load(buffers.source, base + i, lanes)
            if key.dtypes[0] == "uint8":
                x = dequantized(x, "uint8", lanes, buffers.arguments, "a")
            if key.kind == "softmax" and buffers.constants:
                period = key.shapes[1][0]
                at = base if period == int(np.prod(key.shapes[0])) else tirx.floormod(base, period)
                x = x + load(buffers.constants[0], at + i, lanes)
            store(self.scratch, i, x, lanes)
            return load(self.scratch, i, lanes)

        return read

    def _kept(self, i: Expr | int, lanes: int) -> Expr:
        return load(self.scratch, i, lanes)

    def _reduce(self, value: Callable[[Expr | int, int], Expr], combine: Callable[[Expr, Expr], Expr], start: float) -> Expr:
        """Combine value(i, lanes) over the row into a scalar."""
        lanes, size = self.plan.isa.lanes, self.plan.row
        step = lanes * ACCUMULATORS if size >= lanes * ACCUMULATORS else lanes
        total = registers(step // lanes, vector_type("float32", lanes))
        for j in range(step // lanes):
            T.buffer_store(total, constant(start, "float32", lanes), [j])
        if size >= step:
            with T.serial(0, size // step) as i:
                for j in range(step // lanes):
                    T.buffer_store(total, combine(tirx.BufferLoad(total, [j]), value(i * step + j * lanes, lanes)), [j])
        done = size // step * step
        for at in range(done, size - size % lanes, lanes):
            T.buffer_store(total, combine(tirx.BufferLoad(total, [0]), value(at, lanes)), [0])
        for j in range(1, step // lanes):
            T.buffer_store(total, combine(tirx.BufferLoad(total, [0]), tirx.BufferLoad(total, [j])), [0])
        result = registers(1, "float32")
        T.buffer_store(result, horizontal(tirx.BufferLoad(total, [0]), lanes, combine), [0])
        if size % lanes:
            last = horizontal(value(size - size % lanes, size % lanes), size % lanes, combine)
            T.buffer_store(result, combine(tirx.BufferLoad(result, [0]), last), [0])
        return tirx.BufferLoad(result, [0])

    def _softmax(self, base: Expr | int) -> None:
        """exp(x - max) over its sum."""
        largest = self._reduce(self._input(base), tirx.max, -3.402823466e38)

        def power(i: Expr | int, lanes: int) -> Expr:
            store(self.scratch, i, exp(self._kept(i, lanes) - splat(largest, lanes), lanes), lanes)
            return self._kept(i, lanes)

        inverse = self._scalar(tirx.const(1.0, "float32") / self._reduce(power, lambda a, b: a + b, 0.0))
        self._write(base, lambda i, lanes: self._kept(i, lanes) * splat(inverse, lanes))

    def _layer_norm(self, base: Expr | int) -> None:
        """(x - mean) / sqrt(variance + epsilon) * weight + shift; the variance is summed about the mean."""
        size = tirx.const(1.0 / self.plan.row, "float32")
        mean = self._scalar(self._reduce(self._input(base), lambda a, b: a + b, 0.0) * size)

        def square(i: Expr | int, lanes: int) -> Expr:
            store(self.scratch, i, self._kept(i, lanes) - splat(mean, lanes), lanes)
            return self._kept(i, lanes) * self._kept(i, lanes)

        variance = self._reduce(square, lambda a, b: a + b, 0.0) * size
        inverse = self._scalar(tirx.const(1.0, "float32") / tirx.sqrt(variance + tirx.const(self.plan.key.epsilon, "float32")))

        def normal(i: Expr | int, lanes: int) -> Expr:
            weight, shift = (load(table, i, lanes) for table in self.buffers.constants)
            return self._kept(i, lanes) * splat(inverse, lanes) * weight + shift

        self._write(base, normal)

    def _l2_normalize(self, base: Expr | int) -> None:
        """Divide by max(|x|, epsilon)."""
        read = self._input(base)

        def square(i: Expr | int, lanes: int) -> Expr:
            x = read(i, lanes)
            return x * x

        length = tirx.sqrt(self._reduce(square, lambda a, b: a + b, 0.0))
        inverse = self._scalar(tirx.const(1.0, "float32") / tirx.max(length, tirx.const(self.plan.key.epsilon, "float32")))
        self._write(base, lambda i, lanes: self._kept(i, lanes) * splat(inverse, lanes))

    def _scalar(self, value: Expr) -> Expr:
        """Compute a scalar once."""
        kept = registers(1, "float32")
        T.buffer_store(kept, value, [0])
        return tirx.BufferLoad(kept, [0])

    def _write(self, base: Expr | int, value: Callable[[Expr | int, int], Expr]) -> None:
        """Store value(i, lanes) over the row."""
        plan = self.plan
        for_vectors(plan.row, plan.isa.lanes, lambda i, n: plan.store(self.buffers, base + i, value(i, n), n))
