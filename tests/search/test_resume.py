"""A search that is killed in mid-trial and started again, as processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

COMMAND = [
    sys.executable,
    str(Path(__file__).parents[1] / "analytic.py"),
    "search",
    "--budget",
    "22",
    "--restarts",
    "0",
    "--json",
]


def run(folder: Path, **trouble: str) -> subprocess.CompletedProcess[str]:
    """Search in a folder."""
    return subprocess.run(COMMAND, cwd=folder, env=os.environ | trouble, capture_output=True, text=True, check=False)


def trials(folder: Path) -> list[FrozenTrial]:
    """All trials of the folder's study."""
    return optuna.load_study(study_name="demo", storage=f"sqlite:///{folder}/studies/demo.db").get_trials()


def completed(folder: Path) -> dict[int, str]:
    """Number -> configuration hash of the completed trials."""
    return {trial.number: trial.user_attrs["config_hash"] for trial in trials(folder) if trial.state == TrialState.COMPLETE}


def check_whole(folder: Path, before: dict[int, str]) -> None:
    """No completed trial lost, none repeated, budget met, nothing half-written."""
    after = completed(folder)
    assert before.items() <= after.items()
    assert len(after) == 22
    assert max(Counter(after.values()).values()) == 1
    assert {trial.state for trial in trials(folder)} <= {
        TrialState.COMPLETE,
        TrialState.FAIL,
        TrialState.PRUNED,
        TrialState.WAITING,
    }


@pytest.mark.slow
@pytest.mark.parametrize("at", ["21"])
def test_kill_in_mid_trial_and_the_same_command_again(tmp_path: Path, at: str) -> None:
    assert run(tmp_path, TROUBLE="kill", TROUBLE_AT=at).returncode == -signal.SIGKILL
    before = completed(tmp_path)
    assert len(before) == int(at) - 1
    (running,) = [trial for trial in trials(tmp_path) if trial.state == TrialState.RUNNING]
    again = run(tmp_path)
    assert again.returncode == 0, again.stderr
    check_whole(tmp_path, before)
    reaped = trials(tmp_path)[running.number]
    assert reaped.state == TrialState.FAIL
    assert reaped.user_attrs["error"] == "the process was killed"
    assert running.user_attrs["config_hash"] in completed(tmp_path).values()
    assert json.loads(again.stdout)["trials"]["complete"] == 22


@pytest.mark.slow
def test_kill_at_any_moment(tmp_path: Path) -> None:
    process = subprocess.Popen(COMMAND, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("studies/demo.artifacts/*"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    # Anywhere between two trials or within one, as chance has it.
    time.sleep(random.random() / 5)
    process.kill()
    process.wait()
    before = completed(tmp_path)
    again = run(tmp_path)
    assert again.returncode == 0, again.stderr
    check_whole(tmp_path, before)


@pytest.mark.slow
def test_interrupt_is_130_and_the_same_command_continues(tmp_path: Path) -> None:
    first = run(tmp_path, TROUBLE="interrupt", TROUBLE_AT="5")
    assert first.returncode == 130, first.stderr
    assert "intact with 4 measured trials" in first.stderr
    assert "Traceback" not in first.stderr
    assert first.stdout == ""
    before = completed(tmp_path)
    assert [trial.user_attrs["error"] for trial in trials(tmp_path) if trial.state == TrialState.FAIL] == ["interrupted"]
    assert run(tmp_path).returncode == 0
    check_whole(tmp_path, before)


@pytest.mark.slow
def test_a_pipeline_that_is_interrupted_and_then_killed(tmp_path: Path) -> None:
    first = run(tmp_path, PIPELINE="1", TROUBLE="interrupt", TROUBLE_AT="5")
    assert first.returncode == 130, first.stderr
    assert "Traceback" not in first.stderr
    failed = [trial for trial in trials(tmp_path) if trial.state == TrialState.FAIL]
    # The one that was measured, and the one that was being prepared if it had been asked for.
    assert 1 <= len(failed) <= 2
    assert {trial.user_attrs["error"] for trial in failed} == {"interrupted"}
    # This process measures from the fifth trial on.
    assert run(tmp_path, PIPELINE="1", TROUBLE="kill", TROUBLE_AT="8").returncode == -signal.SIGKILL
    before = completed(tmp_path)
    running = [trial for trial in trials(tmp_path) if trial.state == TrialState.RUNNING]
    # The trial before may not have been written down yet, and the one after not been asked for.
    assert 1 <= len(running) <= 3
    last = run(tmp_path, PIPELINE="1")
    assert last.returncode == 0, last.stderr
    check_whole(tmp_path, before)
    assert {trials(tmp_path)[one.number].user_attrs["error"] for one in running} == {"the process was killed"}
    wanted = {trial.user_attrs["config_hash"] for trial in (*failed, *running) if "config_hash" in trial.user_attrs}
    assert wanted <= set(completed(tmp_path).values())


def test_a_second_driver_is_refused(tmp_path: Path) -> None:
    first = subprocess.Popen(
        COMMAND, cwd=tmp_path, env=os.environ | {"TROUBLE": "slow"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    lock = tmp_path / "studies" / "demo.db.demo.lock"
    deadline = time.monotonic() + 60
    while not (lock.exists() and lock.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.02)
    second = run(tmp_path)
    first.kill()
    first.wait()
    assert second.returncode == 1
    assert f"process {first.pid}" in second.stderr
    assert "Traceback" not in second.stderr
