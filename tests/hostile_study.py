"""A study whose names would do harm if a page took them for anything but text."""

from __future__ import annotations

from pathlib import Path

import optuna
from analytic import AnalyticEvaluator

from qsearch.config import QuantConfig
from qsearch.report.documents import record_run
from qsearch.search.loop.trial_attributes import objective_values, trial_attributes
from qsearch.search.study import Identity, StudyHandle, load_study, study_to_search

HARM = "</script><script>document.title='harmed'</script><img src=x onerror=\"document.title='harmed'\">"
NAMES = (HARM, "<!--<script>", "{{data}}", "a\u2028b\nc", "'\"><svg onload=\"document.title='harmed'\">", "=1+1")


def hostile_study(folder: Path, layers: tuple[str, ...] = NAMES, old: bool = False) -> StudyHandle:
    """A study of three trials over layers of these names; as an older version wrote it, without what came since."""
    url, evaluator = f"sqlite:///{folder}/hostile.db", AnalyticEvaluator()
    measured = evaluator.evaluate(QuantConfig())
    with study_to_search("hostile", Identity({"model": "m"}, {"data": HARM, "space": HARM}), url) as handle:
        facts = {"model": HARM, "target": HARM, "settings": {"threads": 1}, "seconds": {"total": 1.0}, "limits": {}}
        listed = [{"name": name, "type": "conv", "weights": 10} for name in layers]
        newer = {"layers": listed, "machine": {"processor": HARM}, "versions": {HARM: HARM}, "sampler": HARM}
        record_run(handle, evaluator.baseline, facts if old else facts | newer)
        for number in range(3):
            precision = {name: "int8" if at % 3 > number else "fp32" for at, name in enumerate(layers)}
            config = QuantConfig.model_validate({"precision": precision})
            trial = handle.study.ask()
            trial.set_user_attr("config", config.to_json())
            for key, value in trial_attributes(config, measured).items():
                trial.set_user_attr(key, value)
            if old:
                _forget(trial)
            latency, size, loss = objective_values(measured)
            handle.study.tell(trial, (latency - number, size + number, loss + 0.1))
        rows = [
            {"layer": name, "position": at, "precision": HARM, "divergence": 1e-3, "latency_ms": 0.0, "weight_bytes": -3.0}
            for at, name in enumerate(layers)
        ]
        if not old:
            handle.study.set_user_attr("tables", rows)
    return load_study("hostile", url)


def _forget(trial: optuna.Trial) -> None:
    """Take out of a measurement what studies did not have at first."""
    measurement = dict(trial.user_attrs["measurement"])
    for name in ("divergence_by_images", "kernels_sha256"):
        measurement.pop(name, None)
    for part, names in {"accuracy": ("divergence", "metric"), "latency": ("ratio", "raw_ms", "noisy", "source")}.items():
        measurement[part] = {key: value for key, value in measurement[part].items() if key not in names}
    trial.set_user_attr("measurement", measurement)
