"""What every kernel is wrapped in, whatever its device: a PrimFunc with a symbol, and the scalars of its operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from qsearch.quantize.program import FLOATS, INTEGERS

__all__ = ["Arguments", "declare_arguments", "kernel"]


def kernel(symbol: str, body: Callable[[], None], overlapping: bool = False) -> tirx.PrimFunc:
    """Write a PrimFunc.

    Args:
        symbol: Its name.
        body: Declares its arguments with `T.arg` and emits its statements.
        overlapping: Arguments may share memory.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(symbol)
        T.func_attr({"global_symbol": symbol, "tirx.noalias": not overlapping})
        body()
    return builder.get()


@dataclass(frozen=True)
class Arguments:
    """The scalar arguments of a kernel: int32 and float32 vectors laid out as `INTEGERS` and `FLOATS`."""

    integers: tirx.Buffer
    floats: tirx.Buffer

    def integer(self, name: str) -> Expr:
        """An int32 scalar by name."""
        return tirx.BufferLoad(self.integers, [INTEGERS.index(name)])

    def float(self, name: str) -> Expr:
        """A float32 scalar by name."""
        return tirx.BufferLoad(self.floats, [FLOATS.index(name)])


def declare_arguments() -> Arguments:
    """Declare the two scalar argument vectors; call it in argument order."""
    integers = T.arg("integers", T.Buffer((len(INTEGERS),), "int32"))
    return Arguments(integers, T.arg("floats", T.Buffer((len(FLOATS),), "float32")))
