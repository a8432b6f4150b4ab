"""Read Fashion-MNIST's image and label files (the IDX format of MNIST)."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qsearch.errors import DataError

__all__ = ["read_idx", "read_images_and_labels"]

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read one gzip-compressed IDX file of unsigned bytes.

    Args:
        path: a file named `*-ubyte.gz`.

    Returns:
        uint8 array with the shape that the file's header states.

    Raises:
        DataError: the file is missing, damaged, or not an IDX file of bytes.
    """
    try:
        content = gzip.decompress(path.read_bytes())
        kind, rank = content[2], content[3]
        shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
    except (OSError, EOFError, IndexError, struct.error) as error:
        raise DataError(f"cannot read {path}: expected a gzip-compressed IDX file ({error})") from error
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if content[:2] != b"\0\0" or kind != _UNSIGNED_BYTE or values.size != math.prod(shape):
        raise DataError(f"{path} is not a complete IDX file of unsigned bytes; restore it from its source")
    return values.reshape(shape)


def read_images_and_labels(folder: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read one of the two parts of Fashion-MNIST.

    Args:
        folder: where the four `.gz` files (or the two of the part) lie.
        part: "train" or "t10k".

    Returns:
        Images, uint8 (N, 28, 28), and labels, int64 (N,) in 0..9.

    Raises:
        DataError: a file is missing or damaged.
    """
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
    return images, labels.astype(np.int64)
