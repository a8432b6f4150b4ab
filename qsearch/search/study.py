"""Studies: made, continued only by the search that made them, and cleaned of what a killed process left behind."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import optuna

from qsearch.errors import StudyError, StudyMismatchError
from qsearch.measure.measurement import MEAN_AVERAGE_PRECISION
from qsearch.search.locks import Turns, driver_lock
from qsearch.search.storage import checked_name, database_file, open_storage, shown_url, storage_errors, storage_url
from qsearch.search.study_trials import reap_trials

__all__ = [
    "DEVICE",
    "LOSS_BOUND_PP",
    "OBJECTIVES",
    "OBJECTIVE_VERSION",
    "Identity",
    "StudyHandle",
    "load_study",
    "objective_names",
    "recorded_labels",
    "recorded_parts",
    "study_has_begun",
    "study_to_join",
    "study_to_search",
]

OBJECTIVES = ("latency_ms", "peak_bytes", "top1_loss_pp")
# Percentage points of top-1; nothing that loses more is worth having. Float's latency and bytes bound the other two.
LOSS_BOUND_PP = 10.0
# Raised whenever the same module would be given other numbers than before.
OBJECTIVE_VERSION = "3"
# The part of an identity that says what kind of device is measured on, where it is this machine's own.
DEVICE = "device_kind"
_IDENTITY = "identity"
_DIGEST = re.compile(r"\w{32,}")

optuna.logging.set_verbosity(logging.WARNING)


def objective_names(metric: str) -> list[str]:
    """What people call the objectives: of a detector the third is mAP_loss_pp; records keep the name of `OBJECTIVES`."""
    return [name.replace("top1", metric) if metric == MEAN_AVERAGE_PRECISION else name for name in OBJECTIVES]


@dataclass(frozen=True)
class Identity:
    """What must stay the same for two runs to belong to one study.

    Attributes:
        parts: Name of a part (model, data, target, space, objective, kernels) -> fingerprint.
        labels: Name of a part -> how the user wrote it, for messages.
    """

    parts: Mapping[str, str]
    labels: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, dict[str, str]]:
        """Plain types, for user attributes."""
        return {"parts": dict(self.parts), "labels": dict(self.labels)}

    def shown(self, part: str) -> str:
        """A part as a person would recognise it."""
        value = self.parts.get(part, "nothing")
        short = value[:12] if _DIGEST.fullmatch(value) else value
        return f"{self.labels[part]!r} ({short})" if part in self.labels else repr(short)


@dataclass(frozen=True)
class StudyHandle:
    """An open study.

    Attributes:
        study: Optuna's study.
        url: SQLAlchemy URL of its database.
        turns: At it, between all processes that work on it; None where this is the only one.
    """

    study: optuna.Study
    url: str
    turns: Turns | None = None

    @property
    def name(self) -> str:
        """The study's name."""
        return self.study.study_name

    @property
    def storage(self) -> optuna.storages.BaseStorage:
        """The storage under it."""
        return self.study._storage

    @property
    def shown_url(self) -> str:
        """The URL of its database, without a password."""
        return shown_url(self.url)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A guarded block that one process at a time is in.

        Raises:
            TurnLost: See `Turns.turn`.
        """
        with nullcontext() if self.turns is None else self.turns.turn(), self.guard():
            yield

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Turn a failure of the database inside the block into a StudyError."""
        with storage_errors(self.url):
            yield


@contextmanager
def study_to_search(
    name: str, identity: Identity, storage: str | None = None, before: str | None = None, process: int | None = None
) -> Iterator[StudyHandle]:
    """Create a study or continue it, as its only driver.

    Args:
        name: The study's name.
        identity: Of the search that wants it.
        storage: SQLAlchemy URL; by default sqlite:///studies/<name>.db.
        before: Why the process that drove it before has ended, if that is known.
        process: See `driver_lock`.

    Yields:
        The study, without running trials.

    Raises:
        StudyMismatchError: It was made by another search.
        StudyError: It cannot be opened, or another process drives it.
    """
    url = storage_url(checked_name(name), storage)
    with driver_lock(name, url, process):
        opened = open_storage(url, create=True)
        with storage_errors(url):
            study = _create_or_load(name, opened)
            _check_identity(study, identity)
            handle = StudyHandle(study, url, Turns(name, url))
        with _closing(opened):
            with handle.turn():
                reap_trials(study, before or "the process was killed")
            yield handle


@contextmanager
def study_to_join(name: str, identity: Identity, storage: str | None = None) -> Iterator[StudyHandle]:
    """Open a study that a search has begun, to work on it beside that search.

    Args:
        name: The study's name.
        identity: Of what this process measures.
        storage: SQLAlchemy URL; by default sqlite:///studies/<name>.db.

    Yields:
        The study.

    Raises:
        StudyMismatchError: It was made by another search, or on another kind of device.
        StudyError: There is no such study, or it cannot be used.
    """
    handle, opened = _load(name, storage, patient=True)
    with _closing(opened):
        with handle.guard():
            _check_identity(handle.study, identity)
        yield handle


@contextmanager
def _closing(storage: optuna.storages.RDBStorage) -> Iterator[None]:
    """Close a storage after the block: the last connection to close folds SQLite's write-ahead log back into the one file."""
    try:
        yield
    finally:
        storage.remove_session()
        storage.engine.dispose()


def load_study(name: str, storage: str | None = None) -> StudyHandle:
    """Open an existing study to read it.

    Args:
        name: The study's name.
        storage: SQLAlchemy URL; by default sqlite:///studies/<name>.db.

    Raises:
        StudyError: There is no such study, or it cannot be read.
    """
    return _load(name, storage)[0]


def _load(name: str, storage: str | None, patient: bool = False) -> tuple[StudyHandle, optuna.storages.RDBStorage]:
    url = storage_url(checked_name(name), storage)
    opened = open_storage(url, create=False, patient=patient)
    with storage_errors(url):
        names = optuna.get_all_study_names(opened)
        if name not in names:
            raise StudyError(f"{shown_url(url)} has no study {name!r}; it has: {', '.join(names) or 'none'}")
        study = optuna.load_study(study_name=name, storage=opened)
        if len(study.directions) != len(OBJECTIVES):
            raise StudyError(_foreign(name))
    return StudyHandle(study, url, Turns(name, url)), opened


def study_has_begun(name: str, storage: str | None = None) -> bool:
    """Whether a search has recorded what the study measures, its kernels included.

    Args:
        name: The study's name.
        storage: SQLAlchemy URL; by default sqlite:///studies/<name>.db.

    Raises:
        StudyError: The storage cannot be read.
    """
    url = storage_url(checked_name(name), storage)
    file = database_file(url)
    if file is not None and not file.is_file():
        return False
    opened = open_storage(url, create=False)
    with storage_errors(url):
        try:
            if name not in optuna.get_all_study_names(opened):
                return False
            return _IDENTITY in optuna.load_study(study_name=name, storage=opened).user_attrs
        finally:
            opened.remove_session()
            opened.engine.dispose()


def recorded_parts(study: optuna.Study) -> dict[str, str]:
    """Name of a part (model, data, target, ...) -> fingerprint, as the study keeps them."""
    return dict(study.user_attrs.get(_IDENTITY, {}).get("parts", {}))


def recorded_labels(study: optuna.Study) -> dict[str, str]:
    """Name of a part -> how the user wrote it, for those that the study keeps so."""
    return dict(study.user_attrs.get(_IDENTITY, {}).get("labels", {}))


def _create_or_load(name: str, storage: optuna.storages.BaseStorage) -> optuna.Study:
    study = optuna.create_study(study_name=name, storage=storage, directions=["minimize"] * len(OBJECTIVES), load_if_exists=True)
    if [direction.name for direction in study.directions] != ["MINIMIZE"] * len(OBJECTIVES):
        raise StudyError(_foreign(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(list(OBJECTIVES))
    return study


def _foreign(name: str) -> str:
    return f"study {name!r} was not made by qsearch (its objectives are not {', '.join(OBJECTIVES)}); use another --study name"


def _check_identity(study: optuna.Study, identity: Identity) -> None:
    kept = study.user_attrs.get(_IDENTITY)
    if kept is None:
        if study.get_trials(deepcopy=False):
            raise StudyError(_foreign(study.study_name))
        study.set_user_attr(_IDENTITY, identity.to_json())
        return
    before = Identity(**kept)
    names = [*before.parts, *(part for part in identity.parts if part not in before.parts)]
    other = [part for part in names if before.parts.get(part) != identity.parts.get(part)]
    if DEVICE in other and DEVICE not in before.parts:
        # Studies made before devices were kept.
        other.remove(DEVICE)
    if len(other) > 1:
        # They follow from the model and the target.
        other = [part for part in other if part != "kernels"]
    if other:
        clauses = "; ".join(f"{part} was {before.shown(part)}, is {identity.shown(part)}" for part in other)
        if other == ["kernels"]:
            clauses += " (`tune` has chosen other tiles since, or another version of qsearch generates other code)"
        raise StudyMismatchError(
            f"study {study.study_name!r} was made by another search: {clauses}. "
            "Measurements of the two cannot be compared: give another --study name, or go back to what it was"
        )
