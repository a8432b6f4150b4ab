"""How a front grew, trial by trial, and where its figures come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from analytic import AnalyticEvaluator, make_graph
from optuna.trial import TrialState

from qsearch.config import QuantConfig
from qsearch.search.front import objective_hypervolume
from qsearch.search.history import hypervolume_history
from qsearch.search.loop.trial_attributes import trial_attributes
from qsearch.search.provenance import layer_facts, machine_facts, package_versions
from qsearch.search.study import Identity, study_to_search


def test_every_kind_of_trial_and_the_volume_after_it(tmp_path: Path) -> None:
    evaluator = AnalyticEvaluator()
    base, measured = evaluator.baseline, evaluator.evaluate(QuantConfig())
    with study_to_search("demo", Identity({"model": "a"}), f"sqlite:///{tmp_path}/a.db") as handle:
        study = handle.study

        def tell(latency_ms: float, loss: float, beyond: float | None = None) -> None:
            trial = study.ask()
            for key, value in trial_attributes(QuantConfig(), measured).items():
                trial.set_user_attr(key, value)
            if beyond is not None:
                trial.set_constraint("latency_ms", beyond)
            study.tell(trial, (latency_ms, 1000.0, loss))

        tell(4.0, 1.0)
        study.tell(study.ask(), state=TrialState.FAIL)
        # Dominated, stopped early, a duplicate, beyond a constraint, better, running.
        tell(5.0, 2.0)
        stopped = study.ask()
        stopped.set_user_attr("bound", {})
        study.tell(stopped, state=TrialState.PRUNED)
        study.tell(study.ask(), state=TrialState.PRUNED)
        tell(0.1, 0.0, beyond=0.5)
        tell(3.0, 0.5)
        study.ask()
        found = hypervolume_history(study, base)
    assert [(one.trial, one.fate) for one in found] == [
        (0, "measured"),
        (1, "failed"),
        (2, "measured"),
        (3, "stopped early"),
        (5, "infeasible"),
        (6, "measured"),
    ]
    first = objective_hypervolume(np.array([[4.0, 1000.0, 1.0]]), base)
    last = objective_hypervolume(np.array([[3.0, 1000.0, 0.5]]), base)
    assert [one.hypervolume for one in found] == pytest.approx([first] * 5 + [last])
    assert last > first > 0


def test_provenance() -> None:
    graph = make_graph(4)
    facts = layer_facts(graph)
    assert [one["name"] for one in facts] == [node.name for node in graph.layers]
    assert [one["type"] for one in facts] == ["conv", "conv", "depthwise", "dense"]
    assert [one["weights"] for one in facts] == [8 * 8 * 9, 8 * 8 * 9, 8 * 9, 10 * 8 * 14 * 14]
    machine = machine_facts()
    assert machine["processor"] and machine["processors"] >= 1
    versions = package_versions(["numpy", "no-such-package"])
    assert versions["numpy"] == np.__version__ and "qsearch" in versions and "no-such-package" not in versions
