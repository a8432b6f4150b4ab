"""The password of a storage is told nowhere."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from analytic import invoke

from qsearch.errors import QSearchError
from qsearch.search.storage import shown_url
from qsearch.search.study import load_study

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://me:{SECRET}@localhost:1/db",
        f"postgresql+asyncpg://me:{SECRET}@localhost:1/db?sslmode=require",
        f"mysql+pymysql://me:{SECRET}@localhost:1/db",
        f"postgresql://me@localhost:1/db?password={SECRET}",
        f"postgresql://me:{SECRET}@localhost:port/db",
        f"sqlite://me:{SECRET}@host/study.db",
        f"nonsense//me:{SECRET}@host",
        f"unknown://me:{SECRET}@host/db",
    ],
)
def test_no_command_tells_a_password(tmp_path: Path, url: str) -> None:
    with pytest.raises(QSearchError) as caught:
        load_study("demo", url)
    assert SECRET not in str(caught.value)
    for command in ("front", "status", "report", "search", "dashboard", "export", "compare"):
        arguments = {"report": ("--out", "r.html"), "export": ("--out", "b"), "compare": ()}.get(command, ())
        study = ("demo", "demo") if command == "compare" else ("--study", "demo")
        result = invoke(tmp_path, command, *study, "--storage", url, *arguments)
        assert result.exit_code in (1, 2), (command, result.output)
        assert SECRET not in result.output and SECRET not in result.stderr, command
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(SECRET.encode() not in path.read_bytes() for path in kept if path.name != "study.db")


def test_what_is_shown_of_a_url() -> None:
    assert (
        shown_url(f"postgresql://me:{SECRET}@host/db?sslmode=x&sslkey={SECRET}")
        == "postgresql://me:***@host/db?sslkey=hidden&sslmode=x"
    )
    assert shown_url("sqlite:///studies/demo.db") == "sqlite:///studies/demo.db"


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")
def test_a_whole_search_tells_no_secret(tmp_path: Path) -> None:
    """SQLite has no password; its URL may hold one in its query all the same, which the driver is given."""
    url = f"sqlite:///{tmp_path}/study.db?timeout=60&cached_token={SECRET}"
    arguments = ("--study", "demo", "--storage", url)
    result = invoke(tmp_path, "search", "--budget", "2", *arguments, "--log-json", "log.json", "--json")
    told = [result.output, result.stderr]
    if result.exit_code == 0:
        for command in (("front", "--json"), ("status", "--json"), ("report", "--out", "r.html")):
            told.append(invoke(tmp_path, command[0], *arguments, *command[1:]).output)
        assert json.loads(told[2])["study"] == "demo"
    assert not any(SECRET in text for text in told)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    assert os.path.exists(tmp_path / "study.db") == (result.exit_code == 0)
