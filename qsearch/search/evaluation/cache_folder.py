"""The folder of kernels, decoded images and statistics: shared by processes, cleaned of what killed ones left."""

from __future__ import annotations

import fcntl
import os
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qsearch.errors import StudyError, UsageError
from qsearch.search.evaluation.cache_entries import cache_entries, evict
from qsearch.whole_files import make_folder

__all__ = ["CacheFolder", "cache_to_itself", "most_bytes"]

MOST_BYTES = 20 * 1024**3

# Scratch names of the kernel cache, kernel times and tiles, statistics, sensitivities, roundings, decoded images and modules.
STRAYS = (
    "kernels/.batch-*",
    "kernels/.*.json.*",
    "statistics/.*.npz.*",
    "sensitivity/.*.npz.*",
    "roundings/.*.npz.*",
    "images/.images-*",
    "modules/*",
)


def most_bytes() -> int:
    """What a cache may take before the entries that were used longest ago are dropped.

    Raises:
        UsageError: QSEARCH_CACHE_BYTES is no number of bytes.
    """
    text = os.environ.get("QSEARCH_CACHE_BYTES", str(MOST_BYTES))
    if not text.isdecimal():
        raise UsageError(f"QSEARCH_CACHE_BYTES is what the cache may take, a whole number of bytes, got {text!r}")
    return int(text)


@contextmanager
def cache_to_itself(path: Path) -> Iterator[None]:
    """Hold a cache folder that nobody else may use meanwhile.

    Raises:
        StudyError: Another process uses it.
    """
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise StudyError(
            f"the cache {path} is in use by another process: wait until it has ended, nothing was removed"
        ) from error
    finally:
        os.close(descriptor)


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
            make_folder(path)
            self._descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StudyError(
                f"cannot write the cache {path}: {error.strerror}; check its permissions and the disk, or run the command in "
                "another folder"
            ) from error
        weakref.finalize(self, os.close, self._descriptor)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass
        else:
            self._clean()
            evict(cache_entries(path), most_bytes())
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def _clean(self) -> None:
        for pattern in STRAYS:
            for stray in self.path.glob(pattern):
                if stray.is_dir():
                    shutil.rmtree(stray, ignore_errors=True)
                else:
                    stray.unlink(missing_ok=True)
