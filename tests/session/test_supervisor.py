"""A search goes on by itself when its process dies, hangs or takes too much memory; nothing of it outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from qsearch.search.storage import open_storage

SCRIPT = str(Path(__file__).parents[1] / "analytic.py")


def search(folder: Path, *options: str, **trouble: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, "search", "--budget", "9", "--jobs", "1", *options]
    return subprocess.run(command, cwd=folder, env=os.environ | trouble, capture_output=True, text=True, check=False)


def trials(folder: Path) -> list[FrozenTrial]:
    storage = open_storage(f"sqlite:///{folder / 'studies' / 'demo.db'}", create=False)
    return optuna.load_study(study_name="demo", storage=storage).get_trials(deepcopy=False)


def in_state(folder: Path, state: TrialState) -> list[FrozenTrial]:
    return [trial for trial in trials(folder) if trial.state == state]


@pytest.mark.parametrize(
    ("trouble", "options", "reason"),
    [
        ("kill", (), "the searching process died of SIGKILL, perhaps for want of memory"),
        pytest.param("hang", ("--trial-timeout", "2"), "no trial has ended within 2 s", marks=pytest.mark.slow),
        pytest.param("memory", ("--max-memory-gb", "1.4"), "GB of memory, more than the 1.4 allowed", marks=pytest.mark.slow),
    ],
)
def test_another_process_goes_on(tmp_path: Path, trouble: str, options: tuple[str, ...], reason: str) -> None:
    # Every process dies of its fifth measurement: two of them, and the third has little left to do.
    result = search(tmp_path, *options, TROUBLE=trouble, TROUBLE_AT="5")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("another process goes on") == 2
    complete, failed = in_state(tmp_path, TrialState.COMPLETE), in_state(tmp_path, TrialState.FAIL)
    assert len(complete) == 9 == len({trial.user_attrs["config_hash"] for trial in complete})
    assert len(failed) == 2 and all(reason in trial.user_attrs["error"] for trial in failed)
    retried = {trial.user_attrs["retry_of"] for trial in complete if "retry_of" in trial.user_attrs}
    assert retried == {trial.number for trial in failed}, "what was under way was tried once more"


def test_a_configuration_that_is_fatal_each_time_is_given_up(tmp_path: Path) -> None:
    result = search(tmp_path, TROUBLE="fatal")
    assert result.returncode == 0, result.stderr
    failed = in_state(tmp_path, TrialState.FAIL)
    fatal = {trial.user_attrs["config_hash"] for trial in failed}
    assert fatal and all(int(digest, 16) % 6 == 0 for digest in fatal)
    for digest in fatal:
        reasons = [trial.user_attrs["error"] for trial in failed if trial.user_attrs["config_hash"] == digest]
        assert reasons == [
            "the searching process died of SIGSEGV",
            "the searching process died of SIGSEGV; given up after 2 attempts",
        ]
    assert len(in_state(tmp_path, TrialState.COMPLETE)) == 9


def test_a_search_that_never_gets_further_stops(tmp_path: Path) -> None:
    result = search(tmp_path, "--restarts", "2", TROUBLE="kill", TROUBLE_AT="1")
    assert result.returncode == 1
    assert "3 times in a row, so the search has stopped: every finished trial is kept" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_interrupt_goes_through(tmp_path: Path) -> None:
    result = search(tmp_path, TROUBLE="interrupt", TROUBLE_AT="3")
    assert result.returncode == 130 and "intact with 2 measured trials" in result.stderr
    assert "another process" not in result.stderr


def test_an_interrupt_of_the_watching_process_is_passed_on(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "search", "--budget", "400", "--jobs", "1"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"TROUBLE": "slow"}, stderr=subprocess.PIPE, text=True
    ) as process:
        while len(list(tmp_path.glob("studies/demo.artifacts/*"))) < 2:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, words = process.communicate()
    assert process.returncode == 130 and "intact" in words and "Traceback" not in words


def test_a_defect_is_no_reason_to_go_on(tmp_path: Path) -> None:
    result = search(tmp_path, TROUBLE="defect", TROUBLE_AT="3")
    assert result.returncode == 1 and "ZeroDivisionError" in result.stderr
    assert "another process" not in result.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_ends_the_watching_process_ends_the_searching_one(tmp_path: Path, number: int) -> None:
    command = [sys.executable, SCRIPT, "search", "--budget", "400", "--jobs", "1"]
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"TROUBLE": "slow"}, stderr=subprocess.DEVNULL) as process:
        try:
            lock = tmp_path / "studies" / "demo.db.demo.lock"
            for _ in range(600):
                if lock.exists() and lock.read_text().strip():
                    break
                time.sleep(0.1)
            assert int(lock.read_text()) == process.pid
            (child,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        finally:
            process.send_signal(number)
        assert process.wait() == -number
    for _ in range(50):
        if not _lives(child):
            return
        time.sleep(0.1)
    pytest.fail("the searching process goes on")


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_limits_need_somebody_who_watches(tmp_path: Path) -> None:
    result = search(tmp_path, "--restarts", "0", "--trial-timeout", "5")
    assert result.returncode == 2 and "they need --restarts 1 or more" in " ".join(result.stderr.split())
