"""Studies: identity, the driver's lock, storage failures."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from qsearch.errors import QSearchError, StudyError, StudyMismatchError, UsageError
from qsearch.search.storage import checked_name, database_file, storage_errors, storage_url
from qsearch.search.study import OBJECTIVES, Identity, load_study, study_has_begun, study_to_search

IDENTITY = Identity(
    {"model": "a" * 64, "data": "b" * 64, "target": "llvm", "space": "c" * 64}, {"model": "demo", "space": "default"}
)


def url_in(folder: Path) -> str:
    """A database in a folder."""
    return f"sqlite:///{folder}/study.db"


def test_default_storage_lies_under_studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with study_to_search("demo", IDENTITY) as handle:
        assert handle.study.metric_names == list(OBJECTIVES)
    assert (tmp_path / "studies" / "demo.db").is_file()
    with sqlite3.connect("studies/demo.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert load_study("demo").name == "demo"


@pytest.mark.parametrize("part", ["model", "data", "target", "space"])
def test_another_identity_is_refused_by_name(tmp_path: Path, part: str) -> None:
    with study_to_search("demo", IDENTITY, url_in(tmp_path)):
        pass
    other = Identity({**IDENTITY.parts, part: "f" * 64}, IDENTITY.labels)
    with pytest.raises(StudyMismatchError) as caught, study_to_search("demo", other, url_in(tmp_path)):
        pass
    assert f"{part} was {IDENTITY.shown(part)}, is {other.shown(part)}" in str(caught.value)
    assert "--study" in str(caught.value)
    assert str(caught.value).count(" was ") == 2


@pytest.mark.parametrize("before", ["k" * 64, None])
def test_other_kernels_are_refused_with_a_reason(tmp_path: Path, before: str | None) -> None:
    recorded = {"kernels": before} if before else {}
    with study_to_search("demo", Identity({**IDENTITY.parts, **recorded}, IDENTITY.labels), url_in(tmp_path)):
        pass
    other = Identity({**IDENTITY.parts, "kernels": "l" * 64}, IDENTITY.labels)
    with pytest.raises(StudyMismatchError, match=r"kernels was '(k{12}|nothing)', is 'l{12}' \(`tune` has chosen") as caught:
        study_to_search("demo", other, url_in(tmp_path)).__enter__()
    assert "--study" in str(caught.value)
    # Another model has other kernels, of course.
    other = Identity({**other.parts, "model": "f" * 64}, IDENTITY.labels)
    with pytest.raises(StudyMismatchError, match="model was") as caught:
        study_to_search("demo", other, url_in(tmp_path)).__enter__()
    assert "kernels" not in str(caught.value)


def test_a_study_begins_when_its_identity_is_kept(tmp_path: Path) -> None:
    assert not study_has_begun("demo", url_in(tmp_path))
    assert not (tmp_path / "study.db").exists()
    with study_to_search("other", IDENTITY, url_in(tmp_path)):
        assert study_has_begun("other", url_in(tmp_path))
    assert not study_has_begun("demo", url_in(tmp_path))
    optuna.create_study(study_name="demo", storage=url_in(tmp_path))
    assert not study_has_begun("demo", url_in(tmp_path))


def test_labels_do_not_count(tmp_path: Path) -> None:
    with study_to_search("demo", IDENTITY, url_in(tmp_path)):
        pass
    with study_to_search("demo", Identity(IDENTITY.parts, {"model": "./demo.pt2"}), url_in(tmp_path)):
        pass


def test_a_study_of_something_else_is_refused(tmp_path: Path) -> None:
    optuna.create_study(study_name="demo", storage=url_in(tmp_path))
    with pytest.raises(QSearchError, match="not made by qsearch"), study_to_search("demo", IDENTITY, url_in(tmp_path)):
        pass
    with pytest.raises(StudyError, match="not made by qsearch"):
        load_study("demo", url_in(tmp_path))


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    with (
        study_to_search("demo", IDENTITY, url_in(tmp_path)),
        pytest.raises(StudyError, match=f"process {os.getpid()}"),
        study_to_search("demo", IDENTITY, url_in(tmp_path)),
    ):
        pass
    with study_to_search("demo", IDENTITY, url_in(tmp_path)), study_to_search("other", IDENTITY, url_in(tmp_path)):
        pass


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = f"import os; from qsearch.search.locks import driver_lock\nwith driver_lock('demo', {url_in(tmp_path)!r}): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    with study_to_search("demo", IDENTITY, url_in(tmp_path)):
        pass


def test_missing_studies_are_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no study database"):
        load_study("demo", url_in(tmp_path))
    assert not (tmp_path / "study.db").exists()
    with study_to_search("demo", IDENTITY, url_in(tmp_path)):
        pass
    with pytest.raises(StudyError, match="no study 'else'; it has: demo"):
        load_study("else", url_in(tmp_path))


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "x" * 101, "a b"])
def test_names_that_are_not_file_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="study's name"):
        checked_name(name)


@pytest.mark.parametrize("url", ["nonsense", "sqlite://", "sqlite:///:memory:"])
def test_urls_that_keep_nothing_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match=r"sqlite:///studies/NAME\.db"):
        database_file(storage_url("demo", url))


def test_passwords_are_not_shown() -> None:
    url = "nodialect+nodriver://user:secret@host/db"
    with pytest.raises(QSearchError) as caught:
        load_study("demo", url)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StudyError, match="not a SQLite database"):
        load_study("demo", url_in(tmp_path))


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StudyError, match="cannot use storage"),
        study_to_search("demo", IDENTITY, f"sqlite:///{tmp_path}/file/a.db"),
    ):
        pass


def test_a_locked_database_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with study_to_search("demo", IDENTITY, url_in(tmp_path)):
        pass
    monkeypatch.setattr("qsearch.search.storage.BUSY_TIMEOUT_S", 0.1)
    other = sqlite3.connect(tmp_path / "study.db")
    other.execute("BEGIN EXCLUSIVE")
    handle = load_study("demo", url_in(tmp_path))
    with pytest.raises(StudyError, match="locked"), handle.guard():
        handle.study.set_user_attr("a", 1)
    other.close()
    handle.study.set_user_attr("a", 2)


def test_a_disk_too_full_for_readers_is_said() -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorname = "SQLITE_IOERR_SHMSIZE"
    with pytest.raises(StudyError, match="the disk is full"), storage_errors("sqlite:///study.db"):
        raise error


def test_an_interrupt_waits_for_the_database(tmp_path: Path) -> None:
    told = []
    with pytest.raises(KeyboardInterrupt), storage_errors(url_in(tmp_path)):
        os.kill(os.getpid(), signal.SIGINT)
        told.append("whole")
    assert told == ["whole"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt), storage_errors(url_in(tmp_path)):
        os.kill(os.getpid(), signal.SIGINT)
        # Who presses twice does not want to wait for a database that another program keeps locked.
        os.kill(os.getpid(), signal.SIGINT)
        told.append("half")
    assert told == ["whole"]
