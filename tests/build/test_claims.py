"""Claims: what several processes want is made once, and nobody waits for one that died, failed or hangs."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from qsearch.build import claims

NAMES = [f"thing{index}" for index in range(24)]
# Started anew, as processes of a search are, and without what this one has open.
FRESH = multiprocessing.get_context("spawn")


def wants(folder: Path, names: list[str], seconds: float) -> None:
    """Want things; what this process makes is noted beside each, and making one takes some time."""

    def make(name: str) -> None:
        with (folder / f"{name}.makers").open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        (folder / name).write_text("made")

    claims.make_once(folder, names, lambda name: (folder / name).exists(), make, 2)


def makers(folder: Path) -> dict[str, list[str]]:
    return {name: (folder / f"{name}.makers").read_text().split() for name in NAMES}


def started(folder: Path, names: list[str], seconds: float) -> multiprocessing.process.BaseProcess:
    """A process that has begun to make the first thing."""
    process = FRESH.Process(target=wants, args=(folder, names, seconds), daemon=True)
    process.start()
    first, deadline = folder / f"{names[0]}.makers", time.monotonic() + 60
    # The file is there before it names its maker.
    while not first.exists() or not first.stat().st_size:
        assert time.monotonic() < deadline and process.is_alive(), "it has not begun"
        time.sleep(0.01)
    return process


def test_each_is_made_by_one(tmp_path: Path) -> None:
    others = [started(tmp_path, NAMES[index:] + NAMES[:index], 0.1) for index in (0, 8)]
    wants(tmp_path, NAMES, 0.1)
    assert all((tmp_path / name).exists() for name in NAMES), "left before all were there"
    for other in others:
        other.join(60)
        assert other.exitcode == 0
    assert {len(one) for one in makers(tmp_path).values()} == {1}
    assert len({process for one in makers(tmp_path).values() for process in one}) > 1, "nothing was shared out"


@pytest.mark.parametrize("ends", [True, False], ids=["killed", "hangs"])
def test_what_another_began_and_did_not_end_is_made_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    monkeypatch.setattr(claims, "_PATIENCE_S", 60.0 if ends else 0.5)
    other = started(tmp_path, NAMES, 600.0)
    assert other.pid is not None
    os.kill(other.pid, signal.SIGKILL if ends else signal.SIGSTOP)
    began = time.monotonic()
    try:
        wants(tmp_path, NAMES, 0.0)
    finally:
        other.kill()
        other.join(60)
    assert all((tmp_path / name).exists() for name in NAMES)
    assert time.monotonic() - began < 30
    assert makers(tmp_path)[NAMES[0]] == [str(other.pid), str(os.getpid())]


def test_what_cannot_be_made_is_told_and_is_tried_again(tmp_path: Path) -> None:
    tried: list[str] = []

    def fail(name: str) -> None:
        tried.append(name)
        raise RuntimeError("no compiler")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no compiler"):
            claims.make_once(tmp_path, ["thing"], lambda name: False, fail, 2)
    assert tried == ["thing", "thing"]


def test_file_systems_without_locks_make_everything_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(claims.fcntl, "lockf", refuse)
    wants(tmp_path, NAMES, 0.0)
    assert all((tmp_path / name).exists() for name in NAMES)
