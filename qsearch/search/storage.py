"""Where studies are kept: SQLite files or any SQLAlchemy database, with failures told in one sentence."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import optuna
import sqlalchemy.exc
from sqlalchemy.engine import URL, make_url

from qsearch.errors import StudyError, UsageError
from qsearch.whole_files import make_folder

__all__ = [
    "STUDIES",
    "artifact_folder",
    "checked_name",
    "database_file",
    "driver_lock",
    "driving_process",
    "open_storage",
    "shown_url",
    "storage_errors",
    "storage_url",
]

STUDIES = Path("studies")
BUSY_TIMEOUT_S = 60
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


class _Connection(sqlite3.Connection):
    """A SQLite connection that neither blocks readers nor waits for the disk at every parameter.

    A trial of 50 layers is some 60 transactions. Without a flush after each they take a third of the time; a
    killed process loses nothing by it, a power cut at most the last trials: never one before them, and a study that has
    ended is on the disk, as its last connection to close waits for that.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.execute("PRAGMA journal_mode=WAL")
        self.execute("PRAGMA synchronous=NORMAL")


def checked_name(study: str) -> str:
    """The study's name, known to be safe as part of a file name.

    Raises:
        UsageError: It is not.
    """
    if not _NAME.fullmatch(study):
        raise UsageError(f"a study's name is made of letters, digits, '.', '_' and '-' (at most 100), got {study!r}")
    return study


def storage_url(study: str, storage: str | None) -> str:
    """The SQLAlchemy URL of a study; by default a SQLite file of its own under studies/."""
    return storage or f"sqlite:///{STUDIES / checked_name(study)}.db"


def database_file(url: str) -> Path | None:
    """The file of a SQLite URL; None for every other database.

    Raises:
        UsageError: Not a database URL, or one that keeps nothing.
    """
    parsed = _parse(url)
    if parsed.get_backend_name() != "sqlite":
        return None
    if not parsed.database or parsed.database == ":memory:":
        raise UsageError(f"storage {url!r} keeps nothing; give a file: sqlite:///studies/NAME.db")
    file = Path(parsed.database)
    if file.is_dir():
        raise UsageError(f"storage {url!r} is a directory; give a file in it: sqlite:///{file / 'NAME.db'}")
    return file


def artifact_folder(study: str, url: str) -> Path:
    """Where the study's artifacts lie: beside its SQLite file, or under studies/."""
    file = database_file(url)
    return (file.parent if file else STUDIES) / f"{study}.artifacts"


def open_storage(url: str, *, create: bool) -> optuna.storages.RDBStorage:
    """Open the database of a study.

    Args:
        url: SQLAlchemy URL.
        create: Make the database if it is not there; else a missing one is an error.

    Returns:
        The storage. SQLite is put into write-ahead mode, which lets the dashboard read while a search writes,
        and waits a minute for a busy database.

    Raises:
        StudyError: The database cannot be opened.
        UsageError: Not a database URL.
    """
    file = database_file(url)
    with storage_errors(url):
        if file is None:
            return optuna.storages.RDBStorage(url, skip_compatibility_check=False)
        if not create and not file.is_file():
            raise StudyError(f"there is no study database {file}; {_studies_there_are(file.parent)}")
        make_folder(file.parent)
        connect = {"timeout": BUSY_TIMEOUT_S, "factory": _Connection}
        return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": connect})


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn a failure of the database into one StudyError that says what to do; Ctrl-C waits until the block is done."""
    try:
        with _interrupt_held():
            yield
    except ImportError as error:
        # Optuna hides which one behind a message of its own.
        cause = error.__cause__ or error.__context__
        name = next((one.name for one in (error, cause) if isinstance(one, ImportError) and one.name), None)
        package = f"the Python package {name!r}" if name else "a database driver that is not installed"
        raise StudyError(f"storage {shown_url(url)} needs {package}; install it") from error
    except (sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, optuna.exceptions.StorageInternalError, OSError) as error:
        raise StudyError(f"cannot use storage {shown_url(url)}: {_reason(error)}") from error


@contextmanager
def _interrupt_held() -> Iterator[None]:
    """Put a first Ctrl-C off to the end of the block: in mid-transaction it would leave one half-told, and a traceback."""
    raising = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(raising):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if held:
            raising(number, frame)
        held.append((number, frame))

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, raising)
    if held:
        raising(*held[0])


@contextmanager
def driver_lock(study: str, url: str, process: int | None = None) -> Iterator[None]:
    """Hold the right to drive a study; the kernel gives it back however the process ends.

    Two drivers would take each other's running trials for dead ones.

    Args:
        study: The study's name.
        url: Of its storage.
        process: The process that others are told of: the one to end if it is to end; None for this one.

    Raises:
        StudyError: Another process drives the study.
    """
    path = _lock_file(study, url)
    with storage_errors(url):
        make_folder(path.parent)
        # Opened without truncation: the text in it names the process that holds the lock.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "r+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = handle.read().strip() or "unknown"
            raise StudyError(
                f"study {study!r} is being searched by process {owner}; wait for it, end it, or use another --study name"
            ) from error
        with storage_errors(url):
            handle.truncate(0)
            handle.write(f"{process or os.getpid()}\n")
            handle.flush()
        yield


def driving_process(study: str, url: str) -> int | None:
    """The process on this machine that drives a study; None where there is none."""
    try:
        with _lock_file(study, url).open() as handle:
            number = int(handle.read())
            os.kill(number, 0)
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return number
    except (OSError, ValueError):
        return None
    return None


def _lock_file(study: str, url: str) -> Path:
    file = database_file(url)
    return file.with_name(f"{file.name}.{study}.lock") if file else STUDIES / f"{study}.lock"


def _parse(url: str) -> URL:
    try:
        return make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError) as error:
        raise UsageError(f"storage {url!r} is not a database URL; expected for example sqlite:///studies/NAME.db") from error


def shown_url(url: str) -> str:
    """The URL without its password."""
    return make_url(url).render_as_string(hide_password=True)


def _studies_there_are(folder: Path) -> str:
    names = sorted(path.stem for path in folder.glob("*.db"))
    return f"studies in {folder}/: {', '.join(names)}" if names else "run a search first"


def _reason(error: BaseException) -> str:
    """The cause in the user's terms, and the way out."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(getattr(cause, "orig", None) or cause)
    code = cause.errno if isinstance(cause, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT) or "is full" in text:
        return "the disk is full; free some space and run the same command again, every finished trial is kept"
    if code in (errno.EROFS, errno.EACCES, errno.EPERM) or "readonly" in text or "unable to open" in text:
        return "it cannot be written; check its permissions, or give another --storage"
    if "locked" in text:
        return f"another program has kept it locked for {BUSY_TIMEOUT_S} s; close that program and run the same command again"
    if "not a database" in text or "malformed" in text:
        return "it is not a SQLite database or it is damaged; give another --storage or restore a copy"
    first_line = text.strip().splitlines()[0] if text.strip() else type(cause).__name__
    return f"{first_line}; every finished trial is kept, run the same command again"
