"""Studies on a database server, which may be restarted while they are worked on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import optuna
import sqlalchemy.exc
from optuna.trial import TrialState

__all__ = ["SERVER_TIMEOUT_S", "ServerStorage", "open_server"]

# How long a server may be away, seconds.
SERVER_TIMEOUT_S = 120
_BETWEEN_TRIES_S = 1.0
_log = logging.getLogger(__name__)


class ServerStorage(optuna.storages.RDBStorage):
    """A server's database, whose restart is waited for: what was asked of it meanwhile is asked again.

    What it had done and could not confirm is done twice: a trial that was begun twice is nobody's, and is failed in the next
    turn; one that was ended is found ended.
    """

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return _patient(self, found) if name in _OPERATIONS else found

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """As Optuna's, but without a complaint about what is so already."""
        try:
            return super().set_trial_state_values(trial_id, state, values)
        except optuna.exceptions.UpdateFinishedTrialError:
            found = self.get_trial(trial_id)
            if found.state != state or (values is not None and list(values) != found.values):
                raise
            return True


_PUBLIC = {name for name in vars(optuna.storages.BaseStorage) if not name.startswith("_")}
_INNER = {"_create_new_trial", "_set_trial_param", "_get_trials", "_get_stale_trial_ids"}
_OPERATIONS = frozenset(_PUBLIC - {"check_trial_is_updatable", "delete_study", "remove_session"} | _INNER)


def _patient(storage: optuna.storages.RDBStorage, operation: Callable[..., Any]) -> Callable[..., Any]:
    """An operation that is tried again while the server does not answer."""

    @wraps(operation)
    def tried(*arguments: Any, **options: Any) -> Any:
        deadline = time.monotonic() + SERVER_TIMEOUT_S
        told = False
        while True:
            try:
                return operation(*arguments, **options)
            except optuna.exceptions.StorageInternalError as error:
                if not _disconnected(error) or time.monotonic() > deadline:
                    raise
            if not told:
                told = True
                _log.warning("the database does not answer; waiting for it, up to %d s", SERVER_TIMEOUT_S)
            storage.engine.dispose()
            time.sleep(_BETWEEN_TRIES_S)

    return tried


def _disconnected(error: BaseException | None) -> bool:
    """Whether a connection could not be made or broke, and not what was asked is at fault."""
    while error is not None:
        if isinstance(error, (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError)):
            return True
        # What is tried on a broken connection is what is told.
        error = error.__cause__ or error.__context__
    return False


def open_server(url: str, deadline: float, **options: Any) -> ServerStorage:
    """Open a server's database.

    Args:
        url: SQLAlchemy URL.
        deadline: Until when a server that does not answer is asked again, on the monotonic clock.
        options: As for Optuna's `RDBStorage`.

    Raises:
        sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError: It cannot be opened.
    """
    # Connections that a restart of the server has broken are found before they are used.
    ping = {"pool_pre_ping": True}
    while True:
        try:
            return ServerStorage(url, engine_kwargs=ping, **options)
        except (sqlalchemy.exc.OperationalError, optuna.exceptions.StorageInternalError) as error:
            if not _disconnected(error) or time.monotonic() > deadline:
                raise
            time.sleep(_BETWEEN_TRIES_S)
