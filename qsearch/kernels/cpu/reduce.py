"""Reductions across the lanes of a vector."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr

__all__ = ["horizontal"]


def horizontal(value: Expr, lanes: int, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """Combine all lanes into a scalar: the upper half onto the lower, until one is left.

    Args:
        value: float32 x lanes, or a scalar where that is one.
        lanes: Number of lanes.
        combine: An associative operation on vectors and on scalars.
    """
    if lanes == 1:
        return value
    vector = tirx.Var("vector", f"float32x{lanes}")
    half = lanes // 2
    halves = combine(_part(vector, 0, half), _part(vector, half, half))
    result = horizontal(halves, half, combine)
    if lanes % 2:
        result = combine(result, _part(vector, lanes - 1, 1))
    return tirx.Let(vector, value, result)


def _part(value: Expr, first: int, count: int) -> Expr:
    return tirx.Shuffle([value], [tirx.const(first + i, "int32") for i in range(count)])
