"""The folder of kernels, decoded images and statistics: shared by processes, cleaned of what killed ones left."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from qsearch.errors import StudyError

__all__ = ["CacheFolder"]

# Scratch names of the kernel cache, the statistics record and the decoded images.
STRAYS = ("kernels/.batch-*", "statistics/.*.npz.*", "images/*.partial")


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

    def _clean(self) -> None:
        for pattern in STRAYS:
            for stray in self.path.glob(pattern):
                if stray.is_dir():
                    shutil.rmtree(stray, ignore_errors=True)
                else:
                    stray.unlink(missing_ok=True)
