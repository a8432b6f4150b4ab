"""The reference's strided products, moves, and the functions of rows that always compute in float."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qsearch.models.graph import Matmul
from qsearch.quantize.program import Op

__all__ = ["FLOAT_FUNCTIONS", "gather", "multiply"]

Array = np.ndarray


def _strided(flat: Array, strides: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """View flat memory through (offset, stride per axis) in elements."""
    steps = tuple(stride * flat.itemsize for stride in strides[1:])
    return np.lib.stride_tricks.as_strided(flat[strides[0] :], shape, steps)


def multiply(matmul: Matmul, a: Array, b: Array) -> Array:
    """A @ b over memory.

    Args:
        matmul: Extents and strides; the factor is not applied.
        a: Memory of the first operand, any shape.
        b: Memory of the second.

    Returns:
        Flat memory of the product, of the operands' dtype.
    """
    *batch, m, n, k = matmul.extents
    left = _strided(np.ascontiguousarray(a).ravel(), matmul.a, (*batch, m, k))
    right = _strided(np.ascontiguousarray(b).ravel(), matmul.b, (*batch, k, n))
    out = np.zeros(int(np.prod((*batch, m, n))), a.dtype)
    _strided(out, matmul.out, (*batch, m, n))[...] = left @ right
    return out


def gather(flat: Array, index: Array, shape: tuple[int, ...], fill: int) -> Array:
    """Copy runs: row i of the output starts at place index[i], or is `fill` where that is -1; shape is (runs, length)."""
    places = index[:, None].astype(np.int64) + np.arange(shape[-1])
    return np.where(index[:, None] < 0, np.asarray(fill, flat.dtype), flat[np.maximum(places, 0)])


def _layer_norm(op: Op, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + op.key.epsilon) * op.constants["weight"] + op.constants["shift"]


def _softmax(op: Op, x: Array) -> Array:
    if "constant" in op.constants:
        x = _shift(op, x)
    power = np.exp(x - x.max(-1, keepdims=True))
    return power / power.sum(-1, keepdims=True)


def _l2_normalize(op: Op, x: Array) -> Array:
    return x / np.maximum(np.sqrt((x * x).sum(-1, keepdims=True)), op.key.epsilon)


def _scale(op: Op, x: Array) -> Array:
    return (x.reshape(-1, len(op.constants["constant"])) * op.constants["constant"]).reshape(x.shape)


def _shift(op: Op, x: Array) -> Array:
    return (x.reshape(-1, len(op.constants["constant"])) + op.constants["constant"]).reshape(x.shape)


def _in_double(function: Callable[[Op, Array], Array]) -> Callable[[Op, Array], Array]:
    return lambda op, x: function(op, x.astype(np.float64)).astype(np.float32)


# By kind: float32 in, float32 out. Scale and shift are exact in float32, the others are computed in float64.
FLOAT_FUNCTIONS: dict[str, Callable[[Op, Array], Array]] = {
    "layer_norm": _in_double(_layer_norm),
    "softmax": _in_double(_softmax),
    "l2_normalize": _in_double(_l2_normalize),
    "scale": _scale,
    "shift": _shift,
}
