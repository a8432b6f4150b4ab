"""`search` with constraints, over the analytic network."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest
from analytic import AnalyticEvaluator, invoke
from optuna.trial import TrialState

from qsearch.config import QuantConfig
from qsearch.errors import StudyError
from qsearch.search.constraints import Constraints, is_feasible, violation
from qsearch.search.front import pick, study_front
from qsearch.search.study import load_study

BASELINE = AnalyticEvaluator().baseline
LATENCY_MS = 0.8 * BASELINE.latency.median_ms
LIMITS = ("--max-latency-ms", f"{LATENCY_MS:.3f}", "--max-bytes", "25000", "--max-loss-pp", "1.5")


def study_of(folder: Path, name: str = "demo") -> optuna.Study:
    """The study of a folder."""
    return load_study(name, f"sqlite:///{folder}/studies/{name}.db").study


def test_a_constrained_front(tmp_path: Path) -> None:
    result = invoke(tmp_path, "search", "--budget", "26", "--sampler", "tpe", "--json", *LIMITS)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    study = study_of(tmp_path)
    trials = study.get_trials(states=(TrialState.COMPLETE,))
    within = {
        trial.number
        for trial in trials
        if trial.values[0] <= round(LATENCY_MS, 3) and trial.values[1] <= 25000 and trial.values[2] <= 1.5
    }
    # Infeasible trials are kept, count, and say what they are.
    assert len(trials) == 26 > len(within) > 0
    assert {trial.number for trial in trials if trial.user_attrs["feasible"]} == within
    assert {trial.number for trial in trials if is_feasible(trial)} == within
    assert all((trial.user_attrs["violation"] > 0) != (trial.number in within) for trial in trials)
    assert document["trials"]["infeasible"] == 26 - len(within)
    assert set(document["constraints"]) == {"latency_ms", "peak_bytes", "top1_loss_pp"}
    front = study_front(study)
    assert {point["trial"] for point in document["front"]} == {point.trial for point in front}
    assert {point.trial for point in front} <= within
    assert {point.trial for point in front} <= {trial.number for trial in study.best_trials}
    assert pick(front, "most-accurate").trial in within
    assert document["closest"] == []


def test_violations_are_shares_of_float() -> None:
    constraints = Constraints.against(BASELINE, {"latency_ms": BASELINE.latency.median_ms, "top1_loss_pp": 1.0})
    found = constraints.violations((1.25 * BASELINE.latency.median_ms, 1.0, 0.5))
    assert found == {"latency_ms": pytest.approx(0.25), "top1_loss_pp": pytest.approx(-0.05)}


def test_contradictory_constraints_end_with_the_closest_and_exit_code_3(tmp_path: Path) -> None:
    contradiction = ("--max-latency-ms", "0.5", "--max-loss-pp", "0")
    result = invoke(tmp_path, "search", "--budget", "10", *contradiction)
    assert result.exit_code == 3, result.stderr
    assert "no configuration is within latency_ms <= 0.5, top1_loss_pp <= 0" in " ".join(result.stdout.split())
    assert "Traceback" not in result.stderr
    # Nothing is pretended: no front, nothing measured again, nothing to pick from.
    assert "measuring the" not in result.stderr
    study = study_of(tmp_path)
    assert study_front(study) == ()
    with pytest.raises(StudyError, match="none is within the constraints"):
        pick(study_front(study), "knee")
    # The study is intact: the same command goes on, and again finds the least violations.
    again = invoke(tmp_path, "search", "--budget", "14", "--json", *contradiction)
    assert again.exit_code == 3
    document = json.loads(again.stdout)
    assert (document["front"], document["hypervolume"]) == ([], 0.0)
    trials = study_of(tmp_path).get_trials(states=(TrialState.COMPLETE,))
    assert len(trials) == document["trials"]["complete"] == document["trials"]["infeasible"] == 14
    least = sorted(trials, key=violation)[:3]
    assert [point["trial"] for point in document["closest"]] == [trial.number for trial in least]
    shown = invoke(tmp_path, "front", "--study", "demo")
    assert "the closest are" in shown.stdout
    assert "0 of 14 trials" in shown.stderr


def test_a_study_keeps_its_constraints(tmp_path: Path) -> None:
    assert invoke(tmp_path, "search", "--budget", "4", "--max-loss-pp", "5").exit_code == 0
    for other in ((), ("--max-loss-pp", "4"), ("--max-loss-pp", "5", "--max-bytes", "1e9")):
        refused = invoke(tmp_path, "search", "--budget", "5", *other)
        assert refused.exit_code == 1
        words = " ".join(refused.stderr.split())
        assert "constraints was 'top1_loss_pp <= 5'" in words and "--study" in words
    assert invoke(tmp_path, "search", "--budget", "5", "--max-loss-pp", "5.0").exit_code == 0
    assert invoke(tmp_path, "search", "--budget", "2", "--study", "free").exit_code == 0
    late = invoke(tmp_path, "search", "--budget", "3", "--study", "free", "--max-loss-pp", "5")
    assert late.exit_code == 1 and "constraints was 'nothing'" in late.stderr


@pytest.mark.parametrize("option", ["--max-latency-ms", "--max-bytes", "--max-loss-pp"])
@pytest.mark.parametrize("limit", ["-1", "nan", "inf", "few"])
def test_impossible_limits_are_usage_errors(tmp_path: Path, option: str, limit: str) -> None:
    result = invoke(tmp_path, "search", option, limit)
    assert result.exit_code == 2
    assert option in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_limit_of_zero_is_meant(tmp_path: Path) -> None:
    result = invoke(tmp_path, "search", "--budget", "3", "--json", "--max-loss-pp", "0")
    assert result.exit_code == 0, result.stderr
    front = json.loads(result.stdout)["front"]
    assert [set(QuantConfig.model_validate(point["config"]).precision.values()) for point in front] == [{"fp32"}]
