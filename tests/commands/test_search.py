"""`search`, `front` and the command line itself, as processes over the analytic network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "analytic.py"
CLI = Path(__file__).parents[2] / "cli.py"


def run(folder: Path, *arguments: str, script: Path = SCRIPT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder."""
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A folder with a finished search, and the document it printed."""
    folder = tmp_path_factory.mktemp("searched")
    result = run(folder, "search", "--budget", "25", "--json", TROUBLE="fail", TROUBLE_AT="7")
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout)


def test_document_of_search(searched: tuple[Path, dict]) -> None:
    _, document = searched
    assert list(document) == ["study", "storage", "model", "target", "trials", "baseline", "front", "hypervolume", "seconds"]
    assert document["study"] == document["model"] == "demo"
    assert document["storage"] == "sqlite:///studies/demo.db"
    assert document["trials"]["complete"] == 25
    assert document["trials"]["failed"] == 1
    assert set(document["baseline"]) == {"latency_ms", "peak_bytes", "top1", "top5", "images"}
    assert {"total", "float_pass", "per_trial_median", "build_median"} <= set(document["seconds"])
    assert 0 < document["hypervolume"] < 1
    assert document["front"]
    for point in document["front"]:
        assert list(point) == [
            "trial",
            "latency_ms",
            "latency_spread_ms",
            "peak_bytes",
            "top1_loss_pp",
            "top1_loss_ci_pp",
            "heldout",
            "config",
        ]
        assert {"top1_loss_pp", "top1_loss_ci_pp", "images"} <= set(point["heldout"])
        assert len(point["config"]["precision"]) == 8


def test_front_prints_the_same_document_and_a_table(searched: tuple[Path, dict]) -> None:
    folder, document = searched
    printed = run(folder, "front", "--study", "demo", "--json")
    assert json.loads(printed.stdout) == document
    table = run(folder, "front", "--study", "demo")
    assert table.returncode == 0
    assert "held-out pp" in table.stdout
    assert all(f"{point['latency_ms']:.3f}" in table.stdout for point in document["front"])
    assert "hypervolume" in table.stderr


def test_the_same_command_again_measures_nothing(searched: tuple[Path, dict]) -> None:
    folder, document = searched
    again = run(folder, "search", "--budget", "25", TROUBLE="defect", TROUBLE_AT="1")
    assert again.returncode == 0, again.stderr
    assert "front of study demo" in again.stdout
    assert "a library that prints" not in again.stdout
    assert "measuring the" not in again.stderr
    assert json.loads(run(folder, "front", "--study", "demo", "--json").stdout)["front"] == document["front"]


def test_another_space_model_or_study_name(searched: tuple[Path, dict]) -> None:
    folder, _ = searched
    other = run(folder, "search", "--space", "precision_preserving", "--budget", "26")
    assert other.returncode == 1
    assert "space was 'default'" in other.stderr
    assert "'precision_preserving'" in other.stderr
    model = run(folder, "search", "--budget", "26", MODEL="n" * 64)
    assert model.returncode == 1
    assert "model was 'demo' (mmmmmmmmmmmm), is 'demo' (nnnnnnnnnnnn)" in model.stderr.replace("\n", " ")
    assert run(folder, "search", "--space", "precision_preserving", "--budget", "2", "--study", "other").returncode == 0


USAGE = {
    "no such preset": (["--space", "nix"], "precision_preserving"),
    "budget": (["--budget", "0"], "--budget"),
    "sampler": (["--sampler", "nix"], "nsgaii"),
    "seed": (["--seed", "-1"], "--seed"),
    "study": (["--study", "../x"], "study's name"),
    "storage": (["--storage", "nix"], "sqlite:///"),
    "unknown option": (["--nix"], "--nix"),
}


@pytest.mark.parametrize("arguments, part", USAGE.values(), ids=USAGE.keys())
def test_usage_errors_exit_2_without_a_traceback(tmp_path: Path, arguments: list[str], part: str) -> None:
    result = run(tmp_path, "search", *arguments)
    assert result.returncode == 2
    assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_space_that_does_not_fit_the_model(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("version: 1\nskip: [nix]\n")
    result = run(tmp_path, "search", "--space", "mine.yaml")
    assert result.returncode == 2
    assert "mine.yaml, line 2" in result.stderr


def test_a_defect_keeps_its_traceback_and_the_study(tmp_path: Path) -> None:
    result = run(tmp_path, "search", "--budget", "9", TROUBLE="defect", TROUBLE_AT="4")
    assert result.returncode == 1
    assert "ZeroDivisionError: a defect" in result.stderr
    assert run(tmp_path, "search", "--budget", "9").returncode == 0


def test_timeout_and_exhaustion_are_said(tmp_path: Path) -> None:
    timeout = run(tmp_path, "search", "--timeout", "0.6", TROUBLE="slow")
    assert timeout.returncode == 0
    assert "time is up after" in timeout.stderr
    (tmp_path / "one.yaml").write_text("version: 1\nskip: ['*']\n")
    exhausted = run(tmp_path, "search", "--space", "one.yaml", "--study", "one", "--json")
    assert exhausted.returncode == 0
    assert "stopping at 1 of 200" in exhausted.stderr
    assert json.loads(exhausted.stdout)["trials"]["complete"] == 1


def test_missing_study(tmp_path: Path) -> None:
    for verb in ("front", "dashboard"):
        result = run(tmp_path, verb, "--study", "nix", script=CLI)
        assert result.returncode == 1
        assert "no study database studies/nix.db" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_study_without_trials(tmp_path: Path) -> None:
    assert run(tmp_path, "search", "--timeout", "0").returncode == 0
    assert "no completed trial yet" in run(tmp_path, "front", "--study", "demo").stderr
    assert json.loads(run(tmp_path, "front", "--study", "demo", "--json").stdout)["front"] == []


def test_help_does_not_wait_for_anything_heavy(tmp_path: Path) -> None:
    start = time.monotonic()
    result = run(tmp_path, "--help", script=CLI)
    assert time.monotonic() - start < 1.0
    assert all(verb in result.stdout for verb in ("search", "front", "dashboard"))
    code = "import sys, qsearch.commands.app; print([m for m in ('torch', 'tvm', 'optuna', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
