"""Where studies are kept: SQLite files or any SQLAlchemy database, with failures told in one sentence."""

from __future__ import annotations

import errno
import re
import signal
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import optuna
import sqlalchemy.exc
from sqlalchemy.engine import URL, make_url

from qsearch.errors import StudyError, UsageError
from qsearch.search.members import GRACE_S, HEARTBEAT_S
from qsearch.search.server_storage import SERVER_TIMEOUT_S, open_server
from qsearch.whole_files import make_folder

__all__ = [
    "STUDIES",
    "artifact_folder",
    "checked_name",
    "database_file",
    "open_storage",
    "shown_url",
    "storage_errors",
    "storage_url",
]

STUDIES = Path("studies")
BUSY_TIMEOUT_S = 60
# How long others may take to make a database, seconds.
_RACE_S = 5.0
_HEART: dict[str, Any] = {"heartbeat_interval": HEARTBEAT_S, "grace_period": GRACE_S}
# Names of what a driver takes in the query of a URL.
_SECRET = re.compile("pass|pwd|secret|token|key", re.IGNORECASE)
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
        raise UsageError(f"storage {shown_url(url)!r} keeps nothing; give a file: sqlite:///studies/NAME.db")
    file = Path(parsed.database)
    if file.is_dir():
        raise UsageError(f"storage {shown_url(url)!r} is a directory; give a file in it: sqlite:///{file / 'NAME.db'}")
    return file


def artifact_folder(study: str, url: str) -> Path:
    """Where the study's artifacts lie: beside its SQLite file, or under studies/."""
    file = database_file(url)
    return (file.parent if file else STUDIES) / f"{study}.artifacts"


def open_storage(url: str, *, create: bool, patient: bool = False) -> optuna.storages.RDBStorage:
    """Open the database of a study.

    Args:
        url: SQLAlchemy URL.
        create: Make the database if it is not there; else a missing one is an error.
        patient: Wait for a server that does not answer, because it did a moment ago.

    Returns:
        The storage. SQLite is put into write-ahead mode, which lets the dashboard read while a search writes,
        and waits a minute for a busy database.

    Raises:
        StudyError: The database cannot be opened.
        UsageError: Not a database URL.
    """
    file = database_file(url)
    with storage_errors(url):
        # Trials are asked for and told here, not in Optuna's `optimize`, and heartbeats sent by `members.Heartbeat`.
        warnings.filterwarnings("ignore", "Heartbeat of storage is supposed", UserWarning)
        warnings.filterwarnings("ignore", ".*heartbeat_interval.*", optuna.exceptions.ExperimentalWarning)
        if file is None:
            deadline = time.monotonic() + (SERVER_TIMEOUT_S if patient else 0)
            return _made(lambda: open_server(url, deadline, **_HEART))
        if not create and not file.is_file():
            raise StudyError(f"there is no study database {file}; {_studies_there_are(file.parent)}")
        make_folder(file.parent)
        connect = {"connect_args": {"timeout": BUSY_TIMEOUT_S, "factory": _Connection}}
        return _made(lambda: optuna.storages.RDBStorage(url, engine_kwargs=connect, **_HEART))


def _made(make: Callable[[], optuna.storages.RDBStorage]) -> optuna.storages.RDBStorage:
    """Open a database, and make its tables if they are not there; others may be doing so at the same moment."""
    deadline = time.monotonic() + _RACE_S
    while True:
        try:
            return make()
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, AssertionError) as error:
            # An assertion is Optuna's, of a version that another one is about to write. SQLite does not wait for who changes to
            # write-ahead mode.
            raced = isinstance(error, (sqlalchemy.exc.IntegrityError, AssertionError))
            if not raced and not any(words in str(error) for words in ("already exists", "database is locked")):
                raise
            if time.monotonic() > deadline:
                raise
        time.sleep(_RACE_S / 100)


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
        raise StudyError(f"cannot use storage {shown_url(url)}: {_masked(_reason(error), url)}") from error


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


def _parse(url: str) -> URL:
    try:
        return make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise UsageError(
            f"storage {_unparsed(url)} is not a database URL; expected for example sqlite:///studies/NAME.db"
        ) from None


def shown_url(url: str) -> str:
    """The URL without its password, and without what its query says of one."""
    parsed = make_url(url)
    query = {name: "hidden" if _SECRET.search(name) else value for name, value in parsed.query.items()}
    return parsed.set(query=query).render_as_string(hide_password=True)


def _masked(text: str, url: str) -> str:
    """What a driver says, without the secrets of the URL that it was given."""
    parsed = make_url(url)
    for secret in (parsed.password, *(value for name, value in parsed.query.items() if _SECRET.search(name))):
        text = text.replace(str(secret), "***") if secret else text
    return text


def _unparsed(url: str) -> str:
    """What may be said of a text that is no URL, and may hold a password all the same."""
    return repr(re.sub(r"//.*@", "//***@", url, flags=re.DOTALL)) if "@" in url else repr(url)


def _studies_there_are(folder: Path) -> str:
    names = sorted(path.stem for path in folder.glob("*.db"))
    return f"studies in {folder}/: {', '.join(names)}" if names else "run a search first"


def _reason(error: BaseException) -> str:
    """The cause in the user's terms, and the way out."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    cause = getattr(cause, "orig", None) or cause
    text = str(cause)
    code = cause.errno if isinstance(cause, OSError) else None
    # SQLite calls it an I/O error where the file that its readers share cannot grow.
    no_room = "is full" in text or getattr(cause, "sqlite_errorname", None) == "SQLITE_IOERR_SHMSIZE"
    if code in (errno.ENOSPC, errno.EDQUOT) or no_room:
        return "the disk is full; free some space and run the same command again, every finished trial is kept"
    if code in (errno.EROFS, errno.EACCES, errno.EPERM) or "readonly" in text or "unable to open" in text:
        return "it cannot be written; check its permissions, or give another --storage"
    if "locked" in text:
        return f"another program has kept it locked for {BUSY_TIMEOUT_S} s; close that program and run the same command again"
    if "not a database" in text or "malformed" in text:
        return "it is not a SQLite database or it is damaged; give another --storage or restore a copy"
    first_line = text.strip().splitlines()[0] if text.strip() else type(cause).__name__
    return f"{first_line}; every finished trial is kept, run the same command again"
