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
        height: Rows with padding.
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


def padded_image(image: tuple[int, ...], padding: tuple[int, int, int, int], dtype: str) -> PaddedImage:
    """Extents of a (H, W, C) image padded by (top, left, bottom, right)."""
    height, width, channels = image
    top, left, bottom, right = padding
    row = (left + width + right) * channels
    itemsize = np.dtype(dtype).itemsize
    if row * itemsize % 4096 == 0:
        # Rows a multiple of 4096 bytes apart fall into the same cache sets: measured 5 % slower.
        row += COPY_BYTES // itemsize
    return PaddedImage(top + height + bottom, row, dtype)


def padded_copy(
    source: tirx.Buffer,
    base: Expr | int,
    image: tuple[int, ...],
    padding: tuple[int, int, int, int],
    fill: Expr,
) -> tirx.Buffer:
    """Copy one image into scratch memory with a border of `fill`.

    Args:
        source: Flat buffer of the images.
        base: Index of the image's first element.
        image: (H, W, C).
        padding: (top, left, bottom, right).
        fill: Scalar of the buffer's dtype.

    Returns:
        Flat scratch buffer with the extents of `padded_image`.
    """
    height, width, channels = image
    top, left, bottom, _ = padding
    extents = padded_image(image, padding, source.dtype)
    lanes = COPY_BYTES // np.dtype(source.dtype).itemsize
    scratch = T.alloc_buffer((extents.elements,), source.dtype, scope="global", layout=None, align=64)
    length, before = width * channels, left * channels

    def border(start: Expr | int, size: int) -> None:
        for_vectors(size, lanes, lambda i, n: store(scratch, start + i, splat(fill, n), n))

    border(0, top * extents.row)
    with T.serial(0, height) as h:
        start = (h + top) * extents.row
        border(start, before)
        row = base + h * length
        for_vectors(length, lanes, lambda i, n: store(scratch, start + before + i, load(source, row + i, n), n))
        border(start + before + length, extents.row - before - length)
    border((top + height) * extents.row, bottom * extents.row)
    return scratch
