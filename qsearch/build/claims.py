"""Who makes what, among the processes and machines that share a folder: nobody compiles what another compiles already.

A claim is a lock on one byte of one file (POSIX; network file systems of today pass such locks on), which the kernel gives back
however its holder ends. It saves work and promises nothing: where locks do not reach, or whoever holds one has hung, a thing is
made twice, and the second replaces the first.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

__all__ = ["make_once"]

# What is held for this long while nothing else gets ready is made without the claim.
_PATIENCE_S = 60.0
_POLL_S = 0.02


def make_once(
    folder: Path, names: Iterable[str], is_there: Callable[[str], bool], make: Callable[[str], None], threads: int
) -> None:
    """Make what is missing, each by one of those that share the folder; what others are at is left until last.

    Args:
        folder: Where the claims are kept.
        names: Of what is to be there in the end.
        is_there: Whether one is.
        make: Makes one.
        threads: How many at a time.

    Raises:
        OSError: Claims cannot be kept in the folder.
    """
    descriptor = os.open(folder / ".claims", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def waits(name: str) -> bool:
        """Whether it has to be waited for."""
        if is_there(name):
            return False
        if not _claim(descriptor, name):
            return True
        try:
            # Whoever had the claim until now has made it, unless it failed.
            if not is_there(name):
                make(name)
        finally:
            with suppress(OSError):
                fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, _place(name))
        return False

    try:
        # The threads end before the file is closed that their claims are in.
        with ThreadPoolExecutor(threads) as pool:
            left, deadline = list(names), time.monotonic() + _PATIENCE_S
            while left:
                waited = [name for name, still in zip(left, pool.map(waits, left), strict=True) if still]
                if len(waited) < len(left):
                    deadline = time.monotonic() + _PATIENCE_S
                elif time.monotonic() > deadline:
                    list(pool.map(make, waited))
                    return
                left = waited
                if left:
                    time.sleep(_POLL_S)
    finally:
        os.close(descriptor)


def _claim(descriptor: int, name: str) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _place(name))
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        # A file system without locks.
        return True
    return True


def _place(name: str) -> int:
    """The byte that stands for a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
