"""`search`, `front` and the command line itself, over the analytic network."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest
from analytic import AnalyticEvaluator, invoke
from optuna.trial import TrialState

from qsearch.search.front import objective_hypervolume

SCRIPT = Path(__file__).parents[1] / "analytic.py"
CLI = Path(__file__).parents[2] / "cli.py"


def process(folder: Path, *arguments: str, script: Path = SCRIPT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, as a process."""
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A folder with a finished search, and the document it printed."""
    folder = tmp_path_factory.mktemp("searched")
    result = process(folder, "search", "--budget", "12", "--json", TROUBLE="fail", TROUBLE_AT="7")
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout)


def test_document_of_search(searched: tuple[Path, dict]) -> None:
    _, document = searched
    run = ["study", "storage", "model", "target", "device", "figures", "trials", "image_evaluations", "constraints", "baseline"]
    assert list(document) == [*run, "front", "dropped", "finetuned", "beats_float", "closest", "hypervolume", "bound", "seconds"]
    assert document["study"] == document["model"] == "demo"
    assert document["storage"] == "sqlite:///studies/demo.db"
    assert document["trials"]["complete"] == 12
    assert document["trials"]["failed"] == 1
    assert set(document["baseline"]) == {"latency_ms", "latency_source", "peak_bytes", "top1", "top5", "images", "metric"}
    assert {"total", "float_pass", "per_trial_median", "build_median"} <= set(document["seconds"])
    assert 0 < document["hypervolume"] < 1
    # The planner searches where no sampler is named, and no other one has a bound.
    assert document["bound"]["trials"] == 12
    assert document["front"]
    for point in document["front"]:
        assert list(point) == [
            "trial",
            "latency_ms",
            "latency_spread_ms",
            "latency_source",
            "noisy_timing",
            "peak_bytes",
            "top1_loss_pp",
            "top1_loss_ci_pp",
            "heldout",
            "config",
        ]
        assert {"top1_loss_pp", "top1_loss_ci_pp", "images", "noisy_timing"} <= set(point["heldout"])
        assert point["noisy_timing"] is point["heldout"]["noisy_timing"] is False
        assert len(point["config"]["precision"]) == 8


def test_front_prints_the_same_document_and_a_table(searched: tuple[Path, dict]) -> None:
    folder, document = searched
    printed = invoke(folder, "front", "--study", "demo", "--json")
    assert json.loads(printed.stdout) == document
    table = invoke(folder, "front", "--study", "demo")
    assert table.exit_code == 0
    assert "held-out pp" in table.stdout
    assert all(f"{point['latency_ms']:.3f}" in table.stdout for point in document["front"])
    assert "hypervolume" in table.stderr


def test_the_same_command_again_measures_nothing(searched: tuple[Path, dict]) -> None:
    folder, document = searched
    again = invoke(folder, "search", "--budget", "12", TROUBLE="defect", TROUBLE_AT="1")
    assert again.exit_code == 0, again.stderr
    assert "front of study demo" in again.stdout
    assert "a library that prints" not in again.stdout
    assert "measuring the" not in again.stderr
    assert json.loads(invoke(folder, "front", "--study", "demo", "--json").stdout)["front"] == document["front"]


def test_another_space_model_or_study_name(searched: tuple[Path, dict]) -> None:
    folder, _ = searched
    other = invoke(folder, "search", "--space", "precision_preserving", "--budget", "13")
    assert other.exit_code == 1
    assert "space was 'default'" in other.stderr
    assert "'precision_preserving'" in other.stderr
    model = invoke(folder, "search", "--budget", "13", MODEL="n" * 64)
    assert model.exit_code == 1
    assert "model was 'demo' (mmmmmmmmmmmm), is 'demo' (nnnnnnnnnnnn)" in model.stderr.replace("\n", " ")
    assert invoke(folder, "search", "--space", "precision_preserving", "--budget", "2", "--study", "other").exit_code == 0


def test_other_kernels_end_a_study_and_tuning_leaves_a_begun_one_alone(searched: tuple[Path, dict]) -> None:
    folder, document = searched
    other = invoke(folder, "search", "--budget", "13", KERNELS="l" * 64)
    assert other.exit_code == 1
    words = " ".join(other.stderr.split())
    assert "kernels was" in words and "`tune` has chosen other tiles" in words and "--study" in words
    # The stand-in for the model cannot be tuned: it is not tried.
    again = invoke(folder, "search", "--budget", "12", "--tune", "5", "--json")
    assert again.exit_code == 0, again.stderr
    assert "study demo has begun" in again.stderr
    assert json.loads(again.stdout)["front"] == document["front"]


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
    result = invoke(tmp_path, "search", *arguments)
    assert result.exit_code == 2
    assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_space_that_does_not_fit_the_model(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("version: 1\nskip: [nix]\n")
    result = invoke(tmp_path, "search", "--space", "mine.yaml")
    assert result.exit_code == 2
    assert "mine.yaml, line 2" in result.stderr


def test_a_defect_passes_through_and_leaves_the_study_usable(tmp_path: Path) -> None:
    result = invoke(tmp_path, "search", "--budget", "9", TROUBLE="defect", TROUBLE_AT="4")
    assert isinstance(result.exception, ZeroDivisionError)
    assert invoke(tmp_path, "search", "--budget", "9").exit_code == 0


def test_timeout_and_exhaustion_are_said(tmp_path: Path) -> None:
    timeout = invoke(tmp_path, "search", "--timeout", "0.6", TROUBLE="slow")
    assert timeout.exit_code == 0
    assert "time is up after" in timeout.stderr
    (tmp_path / "one.yaml").write_text("version: 1\nskip: ['*']\n")
    exhausted = invoke(tmp_path, "search", "--space", "one.yaml", "--study", "one", "--json")
    assert exhausted.exit_code == 0
    assert "stopping at 1 of 200" in exhausted.stderr
    assert json.loads(exhausted.stdout)["trials"]["complete"] == 1


def test_a_machine_too_noisy_to_time_is_said_once(tmp_path: Path) -> None:
    result = invoke(tmp_path, "search", "--budget", "6", TROUBLE="noise", TROUBLE_AT="3")
    assert result.exit_code == 0, result.stderr
    words = " ".join(result.stderr.split())
    assert words.count("too noisy to time") == 1 and "taskset" in words
    trials = optuna.load_study(study_name="demo", storage=f"sqlite:///{tmp_path}/studies/demo.db").get_trials()
    noisy = [trial.user_attrs.get("noisy_timing", False) for trial in trials if trial.state == TrialState.COMPLETE]
    assert noisy == [False] * 2 + [True] * 4


def test_noise_in_the_second_measurement_is_said_and_the_same_command_measures_again(tmp_path: Path) -> None:
    result = invoke(tmp_path, "search", "--budget", "6", "--json", AGAIN="noise")
    assert result.exit_code == 0, result.stderr
    words = " ".join(result.stderr.split())
    assert words.count("could not be timed well") == 1 and "1 of these" in words and "run the same command again" in words
    document = json.loads(result.stdout)
    points = [*document["front"], *document["dropped"]]
    assert [point["heldout"]["noisy_timing"] for point in points].count(True) == 1
    assert not any(point["noisy_timing"] for point in points)
    again = invoke(tmp_path, "search", "--budget", "6", "--json")
    assert "measuring the" in again.stderr and "could not be timed" not in again.stderr
    assert not any(point["heldout"]["noisy_timing"] for point in json.loads(again.stdout)["front"])
    assert "measuring the" not in invoke(tmp_path, "search", "--budget", "6", "--json").stderr


def test_the_front_drops_what_the_second_measurement_has_dominated(tmp_path: Path) -> None:
    result = invoke(tmp_path, "search", "--budget", "12", "--json", AGAIN="worse")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    (dropped,) = document["dropped"]
    kept = [point["trial"] for point in document["front"]]
    assert dropped["heldout"]["dominated_by"] in kept and dropped["trial"] not in kept
    # The largest is what turned out worse.
    assert dropped["peak_bytes"] >= max(point["peak_bytes"] for point in document["front"])
    assert dropped["heldout"]["top1_loss_pp"] == 99.0
    values = [[point[name] for name in ("latency_ms", "peak_bytes", "top1_loss_pp")] for point in document["front"]]
    assert document["hypervolume"] == pytest.approx(objective_hypervolume(np.array(values), AnalyticEvaluator().baseline))
    table = invoke(tmp_path, "front", "--study", "demo").stdout
    lines = [line for line in table.splitlines() if "dropped for" in line]
    assert len(lines) == 1 and f"dropped for {dropped['heldout']['dominated_by']}" in lines[0]
    for point in document["front"]:
        assert f"{point['latency_ms']:.3f} ± " in table and f"{point['heldout']['latency_ms']:.3f} ± " in table
        assert f"{point['top1_loss_pp']:+.2f} ± " in table and f"{point['heldout']['top1_loss_pp']:+.2f} ± " in table


def test_where_nothing_beats_float_that_is_said(tmp_path: Path) -> None:
    result = invoke(tmp_path, "search", "--budget", "8", "--json", FLOAT_IS_BEST="1")
    assert result.exit_code == 0, result.stderr
    assert "nothing that was tried beats float in any objective" in result.stderr
    document = json.loads(result.stdout)
    assert document["beats_float"] is False
    assert "nothing that was tried beats float" in invoke(tmp_path, "front", "--study", "demo").stderr


def test_missing_study(tmp_path: Path) -> None:
    for verb in ("front", "dashboard"):
        result = invoke(tmp_path, verb, "--study", "nix")
        assert result.exit_code == 1
        assert "no study database studies/nix.db" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_study_without_trials(tmp_path: Path) -> None:
    assert invoke(tmp_path, "search", "--timeout", "0").exit_code == 0
    assert "no completed trial yet" in invoke(tmp_path, "front", "--study", "demo").stderr
    assert json.loads(invoke(tmp_path, "front", "--study", "demo", "--json").stdout)["front"] == []


def test_help_does_not_wait_for_anything_heavy(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = process(tmp_path, "--help", script=CLI)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time: what else the machine is doing does not count.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert all(verb in result.stdout for verb in ("search", "front", "dashboard"))
    code = "import sys, qsearch.commands.app; print([m for m in ('torch', 'tvm', 'optuna', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_more_jobs_than_processors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsearch.search.loop.processors.available_processors", lambda: [3])
    result = invoke(tmp_path, "search", "--jobs", "2")
    assert result.exit_code == 2
    assert "--jobs 2 needs 1 beside the 1 processors" in result.stderr
    assert invoke(tmp_path, "search", "--jobs", "3").exit_code == 2
    assert not (tmp_path / "studies").exists()
