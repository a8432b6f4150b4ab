"""Where torch's values lie in memory: data movement is composed while importing instead of being carried out.

Permutes, views, slices, rolls, window partitions and paddings only say where an element comes from. A `View`
says it for a whole value: an integer per element, its place in the memory of a graph node. The operators are
applied to these integers, so that any chain of them is one view. Operations that work on rows (linear, layer
norm, softmax) or on elements run on the memory as it lies; a strided product reads its operands through their
strides. Only where nothing else helps is one 'gather' made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

__all__ = ["View", "memory_order", "period", "plain_view", "runs", "strides_of"]


@dataclass(frozen=True, eq=False)
class View:
    """A value of torch's, as elements of a node's memory.

    Attributes:
        node: Name of the node.
        index: int64, torch's logical shape: place in the node's memory, or -1 for a padded zero.
        factor: The value is the element times this number.
    """

    node: str
    index: np.ndarray
    factor: float = 1.0

    def moved(self, index: np.ndarray) -> View:
        """The same node seen through another index."""
        return replace(self, index=index)


def plain_view(name: str, shape: tuple[int, ...]) -> View:
    """The view of a node's own value: channels-last memory for four axes, else as the shape says."""
    if len(shape) != 4:
        return View(name, np.arange(math.prod(shape)).reshape(shape))
    n, c, h, w = shape
    return View(name, np.arange(math.prod(shape)).reshape(n, h, w, c).transpose(0, 3, 1, 2))


def memory_order(index: np.ndarray) -> np.ndarray:
    """The elements in the order in which a node of the index's shape holds them, flat."""
    return (index.transpose(0, 2, 3, 1) if index.ndim == 4 else index).ravel()


def runs(flat: np.ndarray) -> tuple[np.ndarray, int]:
    """Split a flat index into equal runs of adjacent elements.

    Returns:
        Start of every run (-1 for a run of padding), and the longest length that all runs can have.
    """
    padding = flat < 0
    broken = np.flatnonzero(np.where(padding[1:], ~padding[:-1], np.diff(flat) != 1) | (padding[:-1] & ~padding[1:])) + 1
    length = math.gcd(len(flat), int(np.gcd.reduce(broken)) if len(broken) else 0)
    return flat[::length], length


def strides_of(index: np.ndarray) -> tuple[int, ...] | None:
    """(offset, stride per axis) if the index is affine in its coordinates, else None."""
    offset = int(index.flat[0])
    strides = []
    expected = np.full((), offset)
    for axis, extent in enumerate(index.shape):
        at = [0] * index.ndim
        at[axis] = 1
        strides.append(int(index[tuple(at)]) - offset if extent > 1 else 0)
        shape = [1] * index.ndim
        shape[axis] = extent
        expected = expected + (np.arange(extent) * strides[-1]).reshape(shape)
    return (offset, *strides) if offset >= 0 and min(strides, default=0) >= 0 and np.array_equal(expected, index) else None


def period(values: np.ndarray) -> np.ndarray:
    """The shortest array that `values`, flat, repeats."""
    divisors = {d for i in range(1, math.isqrt(len(values)) + 1) if len(values) % i == 0 for d in (i, len(values) // i)}
    for length in sorted(divisors)[:-1]:
        if values[length - 1] == values[-1]:
            rows = values.reshape(-1, length)
            if (rows == rows[0]).all():
                return rows[0].copy()
    return values
