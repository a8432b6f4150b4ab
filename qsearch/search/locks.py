"""Who may do what with a study: one process drives it, and those that share it take turns.

Every lock is the kernel's or the database server's: it is given back however its holder ends. A study in a SQLite file is
shared on one machine, and its locks are files beside it; one on a server is shared between machines, and its locks are those
that the server keeps for a connection.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import sqlalchemy
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.pool import NullPool

from qsearch.errors import StudyError
from qsearch.search.server_storage import SERVER_TIMEOUT_S
from qsearch.search.storage import STUDIES, database_file, shown_url, storage_errors
from qsearch.whole_files import make_folder

__all__ = ["TurnLost", "Turns", "driver_lock", "driving_process", "lane_file", "lane_held"]

# The longest that a turn is waited for, seconds; a sampler may take ten for a proposal.
PATIENCE_S = 600.0
_POLL_S = 0.02
# How a server is asked for a lock at once, and for giving it back.
_SERVER_LOCKS = {
    "postgresql": ("SELECT pg_try_advisory_lock(:number)", "SELECT pg_advisory_unlock(:number)"),
    "mysql": ("SELECT GET_LOCK(:name, 0)", "SELECT RELEASE_LOCK(:name)"),
    "mariadb": ("SELECT GET_LOCK(:name, 0)", "SELECT RELEASE_LOCK(:name)"),
}


class TurnLost(Exception):
    """The server has taken a turn back before it ended: others may have had theirs at the same time."""


class _Lock(Protocol):
    """A lock that one process holds at a time."""

    def take(self) -> bool:
        """Take it, if nobody has it."""
        ...

    def give(self) -> bool:
        """Give it back; whether it was held all the time."""
        ...


class _FileLock:
    """A file that is locked."""

    def __init__(self, path: Path) -> None:
        make_folder(path.parent)
        # Opened without truncation: the text in it may name the process that holds the lock.
        self.file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+")

    def take(self) -> bool:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def give(self) -> bool:
        fcntl.flock(self.file, fcntl.LOCK_UN)
        return True


class _ServerLock:
    """A named lock of a database server, held by a connection of its own."""

    def __init__(self, url: str, name: str) -> None:
        digest = hashlib.sha256(name.encode()).digest()
        self._words = {"number": int.from_bytes(digest[:8], "big", signed=True), "name": f"qsearch {digest[:20].hex()}"}
        self._engine = sqlalchemy.create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        self._take, self._give = _SERVER_LOCKS[make_url(url).get_backend_name()]
        self._connection: Connection | None = None
        self._away_since: float | None = None

    def connect(self) -> None:
        """Connect now, so that a server that is not there is told at once."""
        self._connection = self._engine.connect()

    def take(self) -> bool:
        """Also not to be had while the server is being started anew; after too long that is an error."""
        try:
            if self._connection is None:
                self._connection = self._engine.connect()
            taken = bool(self._scalar(self._take))
        except (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError):
            self._drop()
            now = time.monotonic()
            self._away_since = self._away_since or now
            if now - self._away_since > SERVER_TIMEOUT_S:
                raise
            return False
        self._away_since = None
        return taken

    def give(self) -> bool:
        try:
            return bool(self._scalar(self._give))
        except sqlalchemy.exc.SQLAlchemyError:
            self._drop()
            return False

    def _scalar(self, statement: str) -> object:
        assert self._connection is not None
        return self._connection.execute(sqlalchemy.text(statement), self._words).scalar()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlalchemy.exc.SQLAlchemyError):
                connection.invalidate()
                connection.close()


class Turns:
    """Turns at a study: of all processes that work on it, one at a time asks for trials.

    Args:
        study: The study's name.
        url: Of its storage.
    """

    def __init__(self, study: str, url: str) -> None:
        self._study, self._url = study, url
        self._lock: _Lock | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn, and have it for the block.

        Raises:
            StudyError: Others have had it for too long, or the storage fails.
            TurnLost: At the end of the block: what was done in it may have been done by others as well.
        """
        with storage_errors(self._url):
            if self._lock is None:
                self._lock = _open_lock(self._study, self._url, "turn")
            lock = self._lock
            deadline = time.monotonic() + PATIENCE_S
            while not lock.take():
                if time.monotonic() > deadline:
                    raise StudyError(
                        f"another process has kept study {self._study!r} to itself for {PATIENCE_S:g} s; end the one that hangs "
                        "and run the same command again, every finished trial is kept"
                    )
                # Not in step with the others that wait.
                time.sleep(_POLL_S * (0.5 + random.random()))
        try:
            yield
        except BaseException:
            lock.give()
            raise
        if not lock.give():
            raise TurnLost


@contextmanager
def driver_lock(study: str, url: str, process: int | None = None) -> Iterator[None]:
    """Hold the right to drive a study: to begin it, and to measure its front at the end.

    Args:
        study: The study's name.
        url: Of its storage.
        process: The process that others are told of: the one to end if it is to end; None for this one.

    Raises:
        StudyError: Another process drives the study.
    """
    path = _file_of(study, url, "lock")
    with storage_errors(url):
        lock = _FileLock(path)
    with lock.file as handle:
        if not lock.take():
            owner = handle.read().strip() or "unknown"
            raise StudyError(
                f"study {study!r} is being searched by process {owner}; wait for it, end it, join it with `worker`, or use "
                "another --study name"
            )
        with storage_errors(url):
            handle.truncate(0)
            handle.write(f"{process or os.getpid()}\n")
            handle.flush()
        with _server_driver(study, url):
            yield


@contextmanager
def _server_driver(study: str, url: str) -> Iterator[None]:
    """The same among all machines that share a server."""
    if database_file(url) is not None or make_url(url).get_backend_name() not in _SERVER_LOCKS:
        yield
        return
    with storage_errors(url):
        lock = _ServerLock(url, f"driver {study}")
        lock.connect()
        taken = lock.take()
    if not taken:
        raise StudyError(
            f"study {study!r} is being searched from another machine; join it with `worker`, wait for it, or use another --study "
            "name"
        )
    try:
        yield
    finally:
        lock.give()


def driving_process(study: str, url: str) -> int | None:
    """The process on this machine that drives a study; None where there is none."""
    try:
        with _file_of(study, url, "lock").open() as handle:
            number = int(handle.read())
            os.kill(number, 0)
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return number
    except (OSError, ValueError):
        return None
    return None


def lane_file(study: str, url: str) -> Path:
    """The lock of this machine for what is measured of a study: whoever works on it here measures one at a time."""
    digest = hashlib.sha256(f"{study} {_place(url)}".encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"qsearch-{os.getuid()}-{digest}.lane"


@contextmanager
def lane_held(lane: Path | None) -> Iterator[None]:
    """Hold a lane for the block, once whoever has it is done; nothing where there is none."""
    if lane is None:
        yield
        return
    with os.fdopen(os.open(lane, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _open_lock(study: str, url: str, what: str) -> _Lock:
    if database_file(url) is not None:
        return _FileLock(_file_of(study, url, what))
    if (backend := make_url(url).get_backend_name()) not in _SERVER_LOCKS:
        raise StudyError(
            f"storage {shown_url(url)} cannot be searched by several processes: {backend} has no locks that are known here; "
            f"use PostgreSQL or MySQL, or a SQLite file"
        )
    return _ServerLock(url, f"{what} {study}")


def _file_of(study: str, url: str, what: str) -> Path:
    file = database_file(url)
    return file.with_name(f"{file.name}.{study}.{what}") if file else STUDIES / f"{study}.{what}"


def _place(url: str) -> str:
    """What the processes of one machine agree on, however each of them has written it."""
    file = database_file(url)
    if file is not None:
        return str(file.resolve())
    parsed = make_url(url)
    return f"{parsed.host} {parsed.port} {parsed.database}"
