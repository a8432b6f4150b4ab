"""How a study stands: what is done, how fast it goes, what failed and why, who works on it, and for how long yet."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from datetime import datetime
from itertools import pairwise
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich.table import Table

from qsearch.report.documents import run_of
from qsearch.search.locks import driving_process
from qsearch.search.members import MEMBER
from qsearch.search.study import StudyHandle
from qsearch.search.study_trials import finished, measured_trials

__all__ = ["status_document", "status_table"]

# Trials whose ends tell the rate, and the longest pause between two that still belongs to one run, seconds.
RECENT, PAUSE_S = 30, 600.0


def status_document(handle: StudyHandle) -> dict[str, Any]:
    """Everything there is to say about the progress of a study, as plain types.

    Returns:
        `trials` by state, `budget` (None where no search has recorded one), `trials_per_minute` and `remaining_s` (None where
        too few trials ended, or nothing remains), `failures` by cause, the most frequent first, `stage_seconds` (median over
        the completed trials), `running` (number and seconds since it began), `process`, that which searches, and `workers`,
        the number of processes with a trial under way.
    """
    with handle.guard():
        study, run = handle.study, run_of(handle)
        measured = measured_trials(study)
        trials = study.get_trials(deepcopy=False)
        process = driving_process(handle.name, handle.url)
    budget, rate = run.get("budget"), _per_minute(measured)
    left = None if budget is None else max(budget - len(measured), 0)
    return {
        "study": handle.name,
        "storage": handle.shown_url,
        "process": process,
        "workers": len({json.dumps(one.user_attrs[MEMBER]) for one in trials if _is_worked_on(one)}),
        "budget": budget,
        "trials": _counts(trials, measured),
        "trials_per_minute": rate,
        "remaining_s": 60 * left / rate if left and rate else None,
        "failures": dict(_causes(finished(study, TrialState.FAIL)).most_common()),
        "stage_seconds": _stages(measured),
        "running": [_running(trial) for trial in trials if trial.state == TrialState.RUNNING],
        "last_trial_at": max(
            (trial.datetime_complete.isoformat() for trial in measured if trial.datetime_complete), default=None
        ),
    }


def status_table(document: dict[str, Any]) -> Table:
    """The same for people."""
    table = Table(show_header=False, title=f"study {document['study']}")
    counts, budget = document["trials"], document["budget"]
    measured = counts["complete"] + counts["stopped_early"]
    of = "" if budget is None else f" of {budget}"
    table.add_row("measured", f"{measured}{of}: {counts['complete']} complete, {counts['stopped_early']} stopped early")
    others = ", ".join(f"{counts[name]} {name}" for name in ("failed", "duplicate", "running", "waiting") if counts[name])
    table.add_row("others", others or "none")
    process = document["process"]
    table.add_row("searched by", "no process on this machine" if process is None else f"process {process}")
    if document["workers"] > 1:
        table.add_row("worked on by", f"{document['workers']} processes")
    if (rate := document["trials_per_minute"]) is not None:
        table.add_row("rate", f"{rate:.1f} trials a minute")
    if document["remaining_s"] is not None:
        table.add_row("remaining" if process else "would remain", f"{document['remaining_s'] / 60:.1f} minutes")
    if document["stage_seconds"]:
        table.add_row("a trial", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in document["stage_seconds"].items()))
    for cause, count in document["failures"].items():
        table.add_row(f"failed {count} times" if count > 1 else "failed once", cause)
    return table


def _is_worked_on(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.RUNNING and MEMBER in trial.user_attrs


def _counts(trials: list[FrozenTrial], measured: list[FrozenTrial]) -> dict[str, int]:
    states = Counter(trial.state for trial in trials)
    return {
        "complete": states[TrialState.COMPLETE],
        "stopped_early": len(measured) - states[TrialState.COMPLETE],
        "failed": states[TrialState.FAIL],
        "duplicate": states[TrialState.PRUNED] - (len(measured) - states[TrialState.COMPLETE]),
        "running": states[TrialState.RUNNING],
        "waiting": states[TrialState.WAITING],
    }


def _per_minute(measured: list[FrozenTrial]) -> float | None:
    """Trials a minute, by the last that ended without a pause between them."""
    ends = sorted(trial.datetime_complete for trial in measured if trial.datetime_complete)[-RECENT:]
    gaps = [(after - before).total_seconds() for before, after in pairwise(ends)]
    steady = [gap for gap in gaps if gap <= PAUSE_S]
    return 60 * len(steady) / sum(steady) if len(steady) >= 2 and sum(steady) > 0 else None


def _causes(failed: list[FrozenTrial]) -> Counter[str]:
    return Counter(str(trial.user_attrs.get("error", "not recorded")) for trial in failed)


def _stages(measured: list[FrozenTrial]) -> dict[str, float]:
    """Median seconds of each step of a completed trial, in their order."""
    seconds = [trial.user_attrs["measurement"]["seconds"] for trial in measured if "measurement" in trial.user_attrs]
    names = dict.fromkeys(name for one in seconds for name in one)
    return {name: statistics.median(one[name] for one in seconds if name in one) for name in names}


def _running(trial: FrozenTrial) -> dict[str, Any]:
    start = trial.datetime_start
    return {"trial": trial.number, "seconds": None if start is None else (datetime.now() - start).total_seconds()}
