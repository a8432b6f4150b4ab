"""A padded copy of a channels-last image, as scratch memory of a kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cpu.vectors import for_vectors, load, splat, store

__all__ = ["PaddedImage", "padded_copy", "padded_image"]

# Kernels may read whole vectors or groups beyond a row's last element; the values there are never used.
SLACK_BYTES = 64
COPY_BYTES = 64


@dataclass(frozen=True)
class PaddedImage:
    """Extents of one image with its padding.

    Attributes:
        height: Rows.
        row: Elements of a row, padding (and a pad against cache aliasing) included.
        dtype: Element type.
    """

    height: int
    row: int
    dtype: str

    @property
    def elements(self) -> int:
        """Elements of the scratch buffer, slack included."""
        return self.height * self.row + SLACK_BYTES // np.dtype(self.dtype).itemsize

    @property
    def bytes(self) -> int:
        """Bytes of the scratch buffer."""
        return self.elements * np.dtype(self.dtype).itemsize


def padded_image(rows: int, image: tuple[int, ...], padding: tuple[int, int, int, int], dtype: str) -> PaddedImage:
    """Extents of `rows` rows of a (H, W, C) image padded by (top, left, bottom, right)."""
    _, width, channels = image
    _, left, _, right = padding
    row = (left + width + right) * channels
    itemsize = np.dtype(dtype).itemsize
    if row * itemsize % 4096 == 0:
        # Rows a multiple of 4096 bytes apart fall into the same cache sets: measured 5 % slower.
        row += COPY_BYTES // itemsize
    return PaddedImage(rows, row, dtype)


def padded_copy(
    source: tirx.Buffer,
    start: tuple[Expr | int, Expr | int],
    image: tuple[int, ...],
    padding: tuple[int, int, int, int],
    extents: PaddedImage,
    fill: Expr,
) -> tirx.Buffer:
    """Copy rows of one image into scratch memory with a border of `fill`.

    Args:
        source: Flat buffer of the images.
        start: Index of the image's first element, and the first row to copy, counted with the padding.
        image: (H, W, C).
        padding: (top, left, bottom, right).
        extents: How many rows, and how long.
        fill: Scalar of the buffer's dtype.

    Returns:
        Flat scratch buffer.
    """
    height, width, channels = image
    lanes = COPY_BYTES // np.dtype(source.dtype).itemsize
    scratch = T.alloc_buffer((extents.elements,), source.dtype, scope="global", layout=None, align=64)
    length, before = width * channels, padding[1] * channels

    def border(first: Expr | int, size: int) -> None:
        for_vectors(size, lanes, lambda i, n: store(scratch, first + i, splat(fill, n), n))

    def copy(target: Expr, row: Expr) -> None:
        border(target, before)
        origin = start[0] + row * length
        for_vectors(length, lanes, lambda i, n: store(scratch, target + before + i, load(source, origin + i, n), n))
        border(target + before + length, extents.row - before - length)

    with T.serial(0, extents.height) as h:
        target, row = h * extents.row, start[1] + h - padding[0]
        if not (padding[0] or padding[2]):
            copy(target, row)
        else:
            with T.If(tirx.all(row >= 0, row < height)):
                with T.Then():
                    copy(target, row)
                with T.Else():
                    border(target, extents.row)
    return scratch
