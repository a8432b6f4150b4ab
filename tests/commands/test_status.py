"""`status` and the log of a search."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from analytic import invoke

SCRIPT = Path(__file__).parents[1] / "analytic.py"


def told(folder: Path, *options: str) -> dict[str, Any]:
    result = invoke(folder, "status", "--study", "demo", "--json", *options)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searched")
    result = invoke(folder, "search", "--budget", "10", "--log-json", "log.jsonl", TROUBLE="fail", TROUBLE_AT="4")
    assert result.exit_code == 0, result.output
    return folder


def test_a_finished_study(searched: Path) -> None:
    found = told(searched)
    assert found["budget"] == 10 and found["process"] is None and found["running"] == [] and found["remaining_s"] is None
    counts = found["trials"]
    assert counts["complete"] + counts["stopped_early"] == 10
    assert counts["failed"] == 1 == sum(found["failures"].values())
    assert found["trials_per_minute"] > 0
    assert datetime.fromisoformat(found["last_trial_at"]) <= datetime.now()
    text = invoke(searched, "status", "--study", "demo").stdout
    assert "10 of 10" in text and "no process on this machine" in text and "failed once" in text


def test_every_trial_has_a_line(searched: Path) -> None:
    lines = [json.loads(line) for line in (searched / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["begin", *["trial"] * 11, "end"]
    trials = lines[1:-1]
    assert sum(line["state"] == "fail" for line in trials) == 1
    failed = next(line for line in trials if line["state"] == "fail")
    assert failed["error"] and "latency_ms" not in failed
    for line in trials:
        assert datetime.fromisoformat(line["time"]).tzinfo is not None
        if line["state"] == "complete":
            assert line["latency_ms"] > 0 and line["config_hash"] and line["seconds"] >= 0
    assert lines[-1]["trials"]["complete"] == told(searched)["trials"]["complete"]
    assert len({line["trial"] for line in trials}) == 11


def test_a_log_goes_on_and_tells_what_ended_it(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert invoke(tmp_path, "search", "--budget", "2", "--log-json", str(log)).exit_code == 0
    before = log.read_text()
    result = invoke(tmp_path, "search", "--budget", "6", "--log-json", str(log), TROUBLE="interrupt", TROUBLE_AT="4")
    assert result.exit_code == 130
    assert log.read_text().startswith(before)
    assert json.loads(log.read_text().splitlines()[-1])["reason"] == "SearchInterrupted"


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    result = invoke(tmp_path, "search", "--budget", "2", "--log-json", str(tmp_path / "no" / "log"))
    assert result.exit_code == 2 and "give --log-json another file" in " ".join(result.stderr.split())


def test_a_running_study_is_told_by_another_process(tmp_path: Path) -> None:
    environment = os.environ | {"TROUBLE": "slow"}
    command = [sys.executable, str(SCRIPT), "search", "--budget", "50", "--jobs", "1"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(600):
                time.sleep(0.1)
                found = told(tmp_path) if (tmp_path / "studies" / "demo.db").exists() and _begun(tmp_path) else None
                if found is not None and found["running"] and found["trials"]["complete"] >= 3:
                    break
            assert found is not None
            assert found["process"] == process.pid, "the one to end, though another one searches"
            assert found["budget"] == 50
            assert [one["seconds"] >= 0 for one in found["running"]] == [True]
        finally:
            process.kill()
    after = told(tmp_path)
    assert after["process"] is None and len(after["running"]) == 1


def _begun(folder: Path) -> bool:
    return invoke(folder, "status", "--study", "demo", "--json").exit_code == 0
