"""Attention's strided operands, and moves in memory, as reshapes, slices and transposes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qsearch.errors import UnsupportedModelError
from qsearch.export.interchange.writer import Writer

__all__ = ["gather_runs", "strided", "unstrided"]


def strided(writer: Writer, flat: str, size: int, offset: int, strides: Sequence[int], extents: Sequence[int]) -> str:
    """A view of memory.

    Args:
        writer: Where steps go.
        flat: The memory, one axis.
        size: Its length.
        offset: Element that the view begins with.
        strides: Per axis, in elements.
        extents: Per axis.

    Returns:
        Name of the view, of shape `extents`.

    Raises:
        UnsupportedModelError: Its axes do not nest.
    """
    axes = _nested(writer, strides, extents)
    radices = _radices(writer, size, [strides[axis] for axis in axes])
    name = writer.step("Reshape", flat, shape=tuple(radices))
    rest = offset
    starts = []
    for i in range(len(radices)):
        starts.append(rest // int(np.prod(radices[i + 1 :])))
        rest %= int(np.prod(radices[i + 1 :]))
    ends = [start + (extents[axes[i]] if i < len(axes) else 1) for i, start in enumerate(starts)]
    if any(end > radix for end, radix in zip(ends, radices, strict=True)):
        raise _odd(writer)
    if any(start or end < radix for start, end, radix in zip(starts, ends, radices, strict=True)):
        name = writer.step("Slice", name, starts=tuple(starts), ends=tuple(ends))
    kept = [extents[axis] for axis in axes]
    name = writer.step("Reshape", name, shape=tuple(kept))
    order = [axes.index(axis) for axis in sorted(axes)]
    if order != sorted(order):
        name = writer.step("Transpose", name, perm=tuple(order))
    return writer.step("Reshape", name, shape=tuple(extents))


def unstrided(writer: Writer, name: str, size: int, offset: int, strides: Sequence[int], extents: Sequence[int]) -> str:
    """The inverse: lay a tensor of shape `extents` out in memory that it fills; arguments as of `strided`."""
    axes = _nested(writer, strides, extents)
    if offset or int(np.prod(extents)) != size or _radices(writer, size, [strides[axis] for axis in axes])[-1] != 1:
        raise _odd(writer)
    held = sorted(axes)
    name = writer.step("Reshape", name, shape=tuple(extents[axis] for axis in held))
    order = [held.index(axis) for axis in axes]
    if order != sorted(order):
        name = writer.step("Transpose", name, perm=tuple(order))
    return writer.step("Reshape", name, shape=(size,))


def _nested(writer: Writer, strides: Sequence[int], extents: Sequence[int]) -> list[int]:
    """The axes longer than one, the largest stride first."""
    axes = sorted((axis for axis, extent in enumerate(extents) if extent > 1), key=lambda axis: -strides[axis])
    if any(strides[axis] <= 0 for axis in axes):
        raise _odd(writer)
    return axes


def _radices(writer: Writer, size: int, strides: Sequence[int]) -> list[int]:
    """Extents of memory such that each axis of the view is one of its axes; the last is what one step spans."""
    bounds = [size, *strides]
    if any(outer % inner for outer, inner in zip(bounds, bounds[1:], strict=False)):
        raise _odd(writer)
    return [*(outer // inner for outer, inner in zip(bounds, bounds[1:], strict=False)), bounds[-1]]


def _odd(writer: Writer) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"layer {writer.layer!r} multiplies operands that lie in memory in a way that reshapes and transposes cannot say: "
        "export a bundle instead"
    )


def gather_runs(writer: Writer, flat: str, size: int, index: np.ndarray, length: int) -> str:
    """Copy runs of `length` elements that begin at the places `index`; -1 gives zeros.

    Returns:
        Name of the runs, shape (runs, length).
    """
    whole = size % length == 0 and not (index[index >= 0] % length).any()
    run = length if whole else 1
    rows = writer.step("Reshape", flat, shape=(size // run, run))
    places = index.astype(np.int64) if run == 1 or length == 1 else np.where(index < 0, -1, index.astype(np.int64) // length)
    if not whole:
        places = np.where(index[:, None] < 0, -1, index[:, None].astype(np.int64) + np.arange(length)).ravel()
    if (places < 0).any():
        zeros = writer.constant("zeros", np.zeros((1, run), np.float32))
        rows = writer.step("Concat", rows, zeros, axis=0)
        places = np.where(places < 0, size // run, places)
    taken = writer.step("Gather", rows, writer.constant("index", places), axis=0)
    return taken if whole else writer.step("Reshape", taken, shape=(len(index), length))
