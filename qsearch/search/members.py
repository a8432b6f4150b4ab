"""Who works on a study: which process has a trial under way, whether it still lives, and on what kind of device it measures."""

from __future__ import annotations

import os
import secrets
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy.exc
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

__all__ = ["GRACE_S", "HEARTBEAT_S", "MEMBER", "Heartbeat", "gone", "this_member"]

# Attribute of a trial: who has it under way.
MEMBER = "member"
# How often a process says that it lives, and after what silence it is taken for dead by other machines, seconds.
HEARTBEAT_S, GRACE_S = 10, 60


def this_member() -> dict[str, Any]:
    """This process, as others can find out whether it lives: the machine as it was started last, the process and its start."""
    return {"machine": _machine(), "process": os.getpid(), "started": _started(os.getpid())}


# Of this process: a search that ended in an error may have left a trial running, and another be begun after it.
_runs: set[str] = set()


def gone(trial: FrozenTrial, silent: set[int]) -> bool:
    """Whether nobody works any more on a trial that is running.

    To be asked in a turn: a trial without a member then belongs to a process that died while it had asked for it.

    Args:
        trial: In state running.
        silent: Optuna's identifiers of the trials whose processes have not been heard of for too long.
    """
    member = trial.user_attrs.get(MEMBER)
    if member is None:
        return True
    if member["machine"] == _machine():
        if _started(member["process"]) != member["started"]:
            return True
        if member["process"] == os.getpid():
            return member.get("run") not in _runs
    return trial._trial_id in silent


class Heartbeat:
    """Tells the storage from time to time that a run of the search, which has trials under way, is alive.

    Args:
        storage: The study's.

    Attributes:
        member: What says of a trial whose it is.
    """

    def __init__(self, storage: BaseStorage) -> None:
        self._storage, self._trials, self._end = storage, set[int](), threading.Event()
        self._thread: threading.Thread | None = None
        self.member = this_member() | {"run": secrets.token_hex(8)}
        _runs.add(self.member["run"])

    def begin(self, trial: optuna.Trial) -> None:
        """From now on a trial is under way."""
        self._record(trial._trial_id)
        self._trials.add(trial._trial_id)
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()

    def end(self, trial: optuna.Trial) -> None:
        """It has ended."""
        self._trials.discard(trial._trial_id)

    def close(self) -> None:
        """Be silent."""
        _runs.discard(self.member["run"])
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _beat(self) -> None:
        while not self._end.wait(HEARTBEAT_S):
            for trial in list(self._trials):
                self._record(trial)

    def _record(self, trial: int) -> None:
        # A storage that fails is told of by those that need its answer; one in memory has no others to tell.
        with suppress(optuna.exceptions.OptunaError, sqlalchemy.exc.SQLAlchemyError, AttributeError):
            self._storage.record_heartbeat(trial)  # type: ignore[attr-defined]


def _machine() -> str:
    """A machine between two starts of it, and which of its process numbers are meant: a container has its own."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return os.uname().nodename


def _started(process: int) -> str | None:
    """When a process of this machine was started, in the system's ticks; None if it is no more."""
    with suppress(OSError, IndexError):
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        # What has ended and was not waited for is a zombie.
        return None if state in ("Z", "X") else fields[18]
    return None
