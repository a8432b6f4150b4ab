"""Processes of the real command line, and the small real study that tests of commands and of bundles share."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import optuna
from image_folders import write_classes
from optuna.trial import FrozenTrial, TrialState
from typer.testing import CliRunner

from qsearch.commands.app import app
from qsearch.search.evaluation import remeasure

CLI = Path(__file__).parents[1] / "cli.py"
BUDGET = 6
# A network of three layers and two dozen images of noise: what the demo would show, in seconds.
SMALL = ("search", "--model", "broken_networks:Net", "--data", "data", "--no-early-stopping", "--study", "small")
# The planner times kernels first; `.ci/run` and test_planner_search.py have it.
SEARCH = ("search", "--study", "real", "--sampler", "random", "--budget", str(BUDGET), "--no-early-stopping", "--json")
# What a process killed at another moment would have left.
STRAYS = (
    "studies/cache/kernels/.batch-dead/kernel.o",
    "studies/cache/kernels/.dead.time.json.1-0",
    "studies/cache/images/.images-0.npy.1-0",
    "studies/cache/statistics/.a.npz.x",
)


def start(folder: Path, *arguments: str, environment: Mapping[str, str] = os.environ) -> subprocess.Popen[str]:
    """Start a command in a folder."""
    command = [sys.executable, str(CLI), *arguments]
    # Where broken_networks lies.
    environment = {**environment, "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def command(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder."""
    process = start(folder, *arguments, environment=os.environ | variables)
    out, err = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def refused(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """A command failed with one message that holds these words, and printed nothing else."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.rstrip().endswith(message), result.stderr
    for word in words:
        assert word in message


def within(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder within this process, which has loaded torch and TVM already; so has what it would start."""
    with contextlib.chdir(folder), mock.patch.object(remeasure, "_run_fresh", remeasured_within):
        result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


def remeasured_within(folder: Path) -> subprocess.CompletedProcess[str]:
    """What the process does that measures a front again."""
    remeasure.main(folder)
    return subprocess.CompletedProcess((), 0, "", "")


def fails(folder: Path, code: int, words: tuple[str, ...], *arguments: str) -> None:
    """Run a command within this process and expect its refusal."""
    refused(within(folder, *arguments), code, *words)


def trials(folder: Path, study: str = "real") -> list[FrozenTrial]:
    """All trials of a study."""
    return optuna.load_study(study_name=study, storage=f"sqlite:///{folder}/studies/{study}.db").get_trials()


def completed(folder: Path, study: str = "real") -> dict[int, str]:
    """Number -> configuration hash of the completed trials."""
    return {
        trial.number: trial.user_attrs["config_hash"] for trial in trials(folder, study) if trial.state == TrialState.COMPLETE
    }


@dataclass(frozen=True)
class RealSearch:
    """A finished search.

    Attributes:
        folder: Where it ran.
        before: Number -> configuration hash of the trials that were complete when it was killed.
        document: What the last run printed.
    """

    folder: Path
    before: dict[int, str]
    document: dict[str, Any]

    def json(self, *arguments: str, **variables: str) -> Any:
        """The one document that a command prints with --json."""
        result = command(self.folder, *arguments, "--json", **variables)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)


def search_with_a_kill(folder: Path) -> RealSearch:
    """Search, kill the process once two trials are complete, and give the same command again."""
    process = start(folder, *SEARCH)
    artifacts = folder / "studies" / "real.artifacts"
    # A trial's picture is written shortly before it is complete.
    while process.poll() is None and len(list(artifacts.glob("*"))) < 3:
        time.sleep(0.01)
    process.kill()
    _, words = process.communicate()
    assert process.returncode == -9, words
    for name in STRAYS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"half")
    (artifacts / "00000000-0000-0000-0000-000000000000").write_bytes(b"half a picture")
    before = completed(folder)
    again = command(folder, *SEARCH)
    assert again.returncode == 0, again.stderr
    return RealSearch(folder, before, json.loads(again.stdout))


def search_small(folder: Path) -> Path:
    """A study of the smallest network, of four trials that this process builds and measures itself."""
    write_classes(folder / "data")
    result = within(folder, *SMALL, "--budget", "4", "--jobs", "1")
    assert result.returncode == 0, result.stderr
    return folder
