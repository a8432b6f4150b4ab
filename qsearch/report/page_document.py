"""All that a study's report page shows, as one JSON document: the page only draws it."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

from optuna.trial import FrozenTrial

from qsearch.config import QuantConfig
from qsearch.errors import QSearchError
from qsearch.measure.measurement import TOP1
from qsearch.report.documents import baseline_of, run_of, study_document
from qsearch.report.notes import calibration_text
from qsearch.report.pictures import COLOURS, OTHER_COLOUR
from qsearch.report.table_notes import table_rows
from qsearch.search.constraints import is_feasible, limits_text
from qsearch.search.front import Pick, pick, study_front
from qsearch.search.history import hypervolume_history
from qsearch.search.storage import database_file
from qsearch.search.study import LOSS_BOUND_PP, StudyHandle, recorded_labels, recorded_parts
from qsearch.search.study_trials import finished

__all__ = ["export_command", "layers_of", "page_document"]

# Digits and the rest of a name apart, so that block.10 comes after block.9.
_NUMBER = re.compile(r"(\d+)")


def page_document(handle: StudyHandle) -> dict[str, Any]:
    """Everything that a report of a study shows, as plain types.

    Studies of older versions lack the layers' order, machine and versions: what is not known is None or empty.

    Returns:
        study: of `study_document`; metric, loss_bound_pp, colours; layers: name, type and weights in the order of the
        network; points: front members, fastest first, then those that the second measurement dropped, or, where nothing
        is within the constraints, the closest; others: objectives of the other completed trials; picks: way to pick ->
        name of a point; tables, history, facts.
    """
    study = study_document(handle)
    with handle.guard():
        baseline, run = baseline_of(handle), run_of(handle)
        history = [] if baseline is None else hypervolume_history(handle.study, baseline)
        completed, tables = finished(handle.study), table_rows(handle)
        picks, facts = _picks(handle), _facts(handle, run)
    kinds = ("front", "dropped", "closest")
    listed = [(kind, point) for kind in kinds for point in study[kind]]
    configs = [QuantConfig.model_validate(point["config"]) for _, point in listed]
    layers = layers_of(run, tables, configs)
    shown = {point["trial"] for _, point in listed}
    return {
        "study": study,
        "metric": TOP1 if baseline is None else baseline.accuracy.metric,
        "loss_bound_pp": LOSS_BOUND_PP,
        "colours": COLOURS,
        "other_colour": OTHER_COLOUR,
        "layers": layers,
        "points": [_point(handle, kind, point, config, layers) for (kind, point), config in zip(listed, configs, strict=True)],
        "others": [_other(trial) for trial in completed if trial.number not in shown and "measurement" in trial.user_attrs],
        "picks": picks,
        "tables": tables,
        "history": [asdict(one) for one in history],
        "facts": facts,
    }


def layers_of(
    run: Mapping[str, Any], tables: Sequence[Mapping[str, Any]], configs: Sequence[QuantConfig]
) -> list[dict[str, Any]]:
    """The layers of a study in the order of the network: name, type, weights.

    Where the study does not say, their order is that of the planner's tables, and else that of their names; type and
    weights are then None.

    Args:
        run: What the study records of its last run.
        tables: Rows of the planner's tables; may be none.
        configs: Configurations of the study.
    """
    if run.get("layers"):
        return [dict(one) for one in run["layers"]]
    place = {row["layer"]: row["position"] for row in tables}
    names = dict.fromkeys(name for config in configs for name in config.precision)
    ordered = sorted(names, key=lambda name: (place.get(name, len(place)), _by_number(name)))
    return [{"name": name, "type": None, "weights": None} for name in ordered]


def export_command(handle: StudyHandle, trial: int) -> str:
    """The command that exports a trial, as it is typed into a shell, from any folder."""
    file = database_file(handle.url)
    url = handle.shown_url if file is None else f"sqlite:///{file.resolve()}"
    out = f"{handle.name}-trial-{trial}"
    return shlex.join(["qsearch", "export", "--study", handle.name, "--storage", url, "--trial", str(trial), "--out", out])


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _NUMBER.split(name)]


def _point(
    handle: StudyHandle, kind: str, point: Mapping[str, Any], config: QuantConfig, layers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    precisions = _precisions(config, layers)
    return {
        **point,
        "kind": kind,
        "name": f"trial {point['trial']}",
        "words": calibration_text(config),
        "precisions": precisions,
        "counts": dict(sorted(Counter(precisions).items())),
        "command": export_command(handle, point["trial"]),
    }


def _precisions(config: QuantConfig, layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """One precision per layer."""
    if all(one["type"] for one in layers):
        try:
            resolved = config.resolve({one["name"]: one["type"] for one in layers})
            return [resolved[one["name"]].precision for one in layers]
        except QSearchError:
            # Of a configuration that names other layers, what it says of these is shown.
            pass
    return [config.precision.get(one["name"], config.default_precision) for one in layers]


def _other(trial: FrozenTrial) -> dict[str, Any]:
    latency_ms, peak_bytes, loss = trial.values
    return {
        "name": f"trial {trial.number}",
        "latency_ms": latency_ms,
        "peak_bytes": peak_bytes,
        "top1_loss_pp": loss,
        "feasible": is_feasible(trial),
    }


def _picks(handle: StudyHandle) -> dict[str, str]:
    """What `export --pick` would take."""
    front, baseline = study_front(handle.study), baseline_of(handle)
    if not front or baseline is None:
        return {}
    picked = {how: pick(front, how, baseline=baseline).number for how in get_args(Pick)}
    return {how: "float" if number is None else f"trial {number}" for how, number in picked.items()}


def _facts(handle: StudyHandle, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was searched, where, and with what: titled lists of (name, words)."""
    labels, parts = recorded_labels(handle.study), recorded_parts(handle.study)
    baseline = baseline_of(handle)
    metric = TOP1 if baseline is None else baseline.accuracy.metric
    searched = {
        "model": run.get("model"),
        "target": parts.get("target") or run.get("target"),
        "device": parts.get("device"),
        "data": labels.get("data"),
        "space": labels.get("space"),
        "sampler": run.get("sampler"),
        "threads": (run.get("settings") or {}).get("threads"),
        "constraints": limits_text(run["limits"], metric) if run.get("limits") else None,
        "storage": handle.shown_url,
    }
    seconds = {name.replace("_", " "): f"{value:.1f} s" for name, value in (run.get("seconds") or {}).items()}
    lists = {
        "Search": searched,
        "Machine": run.get("machine") or {},
        "Versions": run.get("versions") or {},
        "Time of the last run": seconds,
    }
    return [
        {"title": title, "rows": [[name, str(value)] for name, value in rows.items() if value is not None]}
        for title, rows in lists.items()
    ]
