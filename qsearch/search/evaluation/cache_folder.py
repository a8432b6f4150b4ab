"""The folder of kernels, decoded images and statistics: shared by processes, cleaned of what killed ones left."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import sys
from pathlib import Path

from qsearch.errors import StudyError

__all__ = ["CacheFolder", "is_whole_elf"]

# Scratch names of the kernel cache, the statistics record and the decoded images.
STRAYS = (
    "kernels/.batch-*",
    *(f"{folder}/.*.npz.*" for folder in ("statistics", "sensitivity", "roundings")),
    "images/*.partial",
    "modules/*",
)


def is_whole_elf(path: Path) -> bool:
    """Whether a file is an ELF file that is not truncated: its last part, the section headers, must lie within it."""
    try:
        with path.open("rb") as stream:
            header, size = stream.read(64), os.fstat(stream.fileno()).st_size
    except FileNotFoundError:
        return False
    # Not for platforms whose object files are of another kind.
    if not sys.platform.startswith("linux"):
        return True
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return False
    order = "<" if header[5] == 1 else ">"
    (offset,) = struct.unpack_from(f"{order}Q", header, 40)
    entry_bytes, entries = struct.unpack_from(f"{order}HH", header, 58)
    return bool(offset + entry_bytes * entries <= size)


class CacheFolder:
    """A cache in use.

    Each user holds a shared lock on the folder, which the kernel gives back however a process ends. Who gets the lock
    for itself alone knows that every scratch file belongs to a process that was killed.
    """

    def __init__(self, path: Path) -> None:
        """Create the folder if it is not there, and clean it if nobody else uses it.

        Args:
            path: The folder.

        Raises:
            StudyError: It cannot be written.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StudyError(
                f"cannot write the cache {path}: {error.strerror}; check its permissions and the disk, or run the command in "
                "another folder"
            ) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass
        else:
            self._clean()
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        self._remove_damaged_kernels()

    def _remove_damaged_kernels(self) -> None:
        """Make the kernel cache compile again what a power cut or a full disk has truncated.

        Loading such a library fails at best; at worst the process dies of reading beyond the end of the file.
        """
        for file in self.path.glob("kernels/*"):
            damaged = (
                file.stat().st_size == 0 if file.suffix == ".lib" else file.suffix in (".o", ".so") and not is_whole_elf(file)
            )
            if damaged:
                file.unlink(missing_ok=True)

    def _clean(self) -> None:
        for pattern in STRAYS:
            for stray in self.path.glob(pattern):
                if stray.is_dir():
                    shutil.rmtree(stray, ignore_errors=True)
                else:
                    stray.unlink(missing_ok=True)
