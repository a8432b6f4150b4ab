"""The file that keeps decoded images: NumPy's format, with a checksum beside it."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qsearch.whole_files import write_whole

__all__ = ["images_are_whole", "mapped_images", "write_images"]

_CHUNK = 1 << 22
# (path, time of change, size) of files whose checksum this process has seen to be right.
_whole: set[tuple[Path, int, int]] = set()


def mapped_images(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    """Map a file of images; None where there is none, or one that is truncated, damaged or not of this shape.

    Args:
        path: Of the file.
        shape: (N, C, H, W).
    """
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    if not isinstance(found, np.memmap) or found.shape != shape or found.dtype != np.float32 or not _known_whole(path):
        return None
    return found


def write_images(final: Path, shape: tuple[int, ...], rows: Iterable[NDArray[np.float32]]) -> None:
    """Write a file row by row.

    Plain writes instead of a writable memory map: on a full disk a write raises OSError, a map kills the process.

    Args:
        final: Of the file.
        shape: (N, C, H, W).
        rows: N arrays, float32 (C, H, W).
    """
    checksum = 0
    with write_whole(final, durable=False) as stream:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for data in chain([header.getvalue()], (row.astype("<f4", copy=False).tobytes() for row in rows)):
            checksum = zlib.crc32(data, checksum)
            stream.write(data)
        # First the checksum: images without one are decoded again.
        with write_whole(_checksum_path(final), durable=False) as beside:
            beside.write(f"{checksum:08x}\n".encode())


def _checksum_path(path: Path) -> Path:
    return path.with_suffix(".crc32")


def images_are_whole(path: Path) -> bool:
    """Whether a file of images has the checksum that it was written with."""
    try:
        return _checksum_path(path).read_text(encoding="ascii").strip() == f"{_crc32(path):08x}"
    except (OSError, UnicodeDecodeError):
        return False


def _known_whole(path: Path) -> bool:
    found = path.stat()
    state = path, found.st_mtime_ns, found.st_size
    if state not in _whole and images_are_whole(path):
        _whole.add(state)
    return state in _whole


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
