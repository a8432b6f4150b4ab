"""Files that are there whole or not at all, whatever stops the process or the machine.

Every file and folder that is read again later is written here: beside its place, under another name, then renamed. So a
killed process leaves the old one or the new one. What a power cut leaves depends on whether the disk was waited for:

* What somebody relies on later without being able to make it again as it was is *durable*: its content reaches the disk
  before its name does, and its name before the writer goes on. A bundle and its versions, an exported file, a kept module,
  a checkpoint, a picture that a trial is about to claim, tuned tiles (kernels, and with them the study, depend on them), and
  tables and roundings that take minutes.
* Cache entries that carry a digest, or cannot be read unless whole, and are made again in seconds are not: kernels and their
  times, decoded images. They are hundreds; a torn one is found by its digest when it is read.

Bundles hold copies of `monitor.py`, packs of `pack_runner.py`, which run without qsearch and do the same by themselves.
"""

from __future__ import annotations

import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["make_folder", "put_in_place", "remove_strays", "scratch_name", "sync_folder", "write_whole"]


@contextmanager
def write_whole(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Write a file; an existing one is replaced once the block has ended without an error.

    Args:
        path: The file; its folder exists.
        durable: Wait for the disk, see above.

    Yields:
        What to write to, bytes.

    Raises:
        OSError: The file cannot be written; it is as it was.
    """
    scratch = scratch_name(path)
    try:
        with scratch.open("xb") as stream:
            yield stream
        put_in_place(scratch, path, durable)
    finally:
        scratch.unlink(missing_ok=True)


def put_in_place(scratch: Path, path: Path, durable: bool = True) -> None:
    """Give a file or folder that is complete its name.

    Args:
        scratch: On the same file system.
        path: Where it goes; an existing file is replaced, and so is an empty folder.
        durable: Wait for the disk, see above.

    Raises:
        OSError: It cannot be; what is there is as it was.
    """
    if durable:
        _sync_all(scratch)
    os.replace(scratch, path)
    if durable:
        sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder, and those that it lies in, durably.

    Raises:
        OSError: It cannot be made.
    """
    missing = [one for one in (path, *path.parents) if not one.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for one in missing:
        sync_folder(one.parent)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder have reached the disk; some file systems, on networks mostly, have no way to."""
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def scratch_name(path: Path) -> Path:
    """A new name beside a path, hidden, which says whose it is and what it is for."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")


def remove_strays(path: Path) -> None:
    """Remove what processes of this machine that were killed while they wrote this file or folder have left beside it.

    For what one process at a time writes; caches are cleaned by who has them to himself.
    """
    for stray in path.parent.glob(f".{glob.escape(path.name)}.*-*"):
        process = stray.name.removeprefix(f".{path.name}.").split("-")[0]
        if not process.isdigit() or _is_running(int(process)):
            continue
        if stray.is_dir():
            shutil.rmtree(stray, ignore_errors=True)
        else:
            stray.unlink(missing_ok=True)


def _sync_all(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, has reached the disk."""
    if not path.is_dir():
        _sync(path)
        return
    for one in path.iterdir():
        _sync_all(one)
    sync_folder(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
