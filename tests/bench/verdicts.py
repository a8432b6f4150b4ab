"""What runs of samplers amount to: hypervolume by trials and by seconds, and how the planner stands among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from campaign import Run
from problems import Problem

from qsearch.search.front import hypervolume
from qsearch.search.planner import drafted_trials
from qsearch.search.samplers import PLANNER

__all__ = ["TRIALS", "Curves", "curves_of", "reference_hypervolume", "results", "spread", "verdicts"]

TRIALS = (10, 20, 25, 50, 100, 200)
COMPARED = (25, 50, 100, 200)


@dataclass(frozen=True)
class Curves:
    """A sampler's runs, one row per seed.

    Attributes:
        percent: Hypervolume after each trial, percent of the reference, float64 (seeds, trials).
        seconds: Processor seconds from the begin to the end of each trial, tables included, float64 (seeds, trials).
        begun: Trials before kernels are timed and before each part of the tables; empty where there are none.
    """

    percent: np.ndarray
    seconds: np.ndarray
    begun: tuple[int, ...] = ()

    def at_trial(self, count: int) -> np.ndarray:
        """Percent after so many trials, per seed."""
        return self.percent[:, count - 1]

    def at_time(self, seconds: float) -> np.ndarray:
        """Percent after so many seconds, per seed; a run that has ended stays where it was."""
        done = (self.seconds <= seconds).sum(axis=1)
        return np.array([row[count - 1] if count else 0.0 for row, count in zip(self.percent, done, strict=True)])


def reference_hypervolume(problem: Problem, digests: Iterable[str] | None = None) -> float:
    """Hypervolume of some configurations, by their content hashes, or of all that is known: 100 %."""
    known = problem.measured.known
    points = known.values() if digests is None else [known[digest] for digest in digests]
    return hypervolume(points, problem.baseline)  # type: ignore[arg-type]


def curves_of(problem: Problem, runs: Sequence[Run]) -> Curves:
    """The curves of one sampler.

    Args:
        problem: What was searched.
        runs: One per seed. They are cut to the shortest: a space may hold fewer configurations than were asked for.
    """
    reference, count = reference_hypervolume(problem), min(len(run.digests) for run in runs)
    percent, seconds = [], []
    begun: tuple[int, ...] = ()
    for run in runs:
        seconds.append(np.array(run.seconds[:count]))
        if run.sampler == PLANNER:
            tables = problem.tables()
            # What was enqueued comes before all tables.
            begun = (len(tables.first), run.opening, max(run.opening, drafted_trials(problem.space)))
            for cpu_s, before in zip((tables.opening_s, *(cpu_s for _, cpu_s in tables.parts)), begun, strict=True):
                seconds[-1][before:] += cpu_s
        points = [problem.measured.known[digest] for digest in run.digests[:count]]
        percent.append([hypervolume(points[: n + 1], problem.baseline) for n in range(count)])  # type: ignore[arg-type]
    return Curves(100.0 * np.array(percent) / reference, np.array(seconds), begun)


def results(curves: Mapping[str, Curves], of_runs: float) -> list[dict[str, Any]]:
    """One row per sampler and number of trials.

    Args:
        curves: Sampler -> its curves.
        of_runs: What makes percent of the reference percent of what the compared runs have found between them.
    """
    return [
        {
            "sampler": sampler,
            "trials": count,
            "hypervolume_pct_mean": float(found.at_trial(count).mean()),
            "hypervolume_pct_std": spread(found.at_trial(count)),
            "hypervolume_pct_of_runs_mean": float(of_runs * found.at_trial(count).mean()),
            "hypervolume_pct_of_runs_std": of_runs * spread(found.at_trial(count)),
            "seconds": float(found.seconds[:, count - 1].mean()),
        }
        for sampler, found in curves.items()
        for count in TRIALS
        if count <= found.percent.shape[1]
    ]


def verdicts(curves: Mapping[str, Curves]) -> dict[str, Any]:
    """How the planner stands: against random, at equal trials, at equal time; empty without a run of it."""
    if PLANNER not in curves:
        return {}
    planner = curves[PLANNER]
    counts = [count for count in COMPARED if all(count <= found.percent.shape[1] for found in curves.values())]
    return {
        "trials_to_equal_random": _trials_to_equal(planner, curves["random"]) if "random" in curves else None,
        "at_equal_trials": [{"trials": n, **_ranking({s: one.at_trial(n) for s, one in curves.items()})} for n in counts],
        "at_equal_time": _at_equal_time(curves),
    }


def _at_equal_time(curves: Mapping[str, Curves]) -> list[dict[str, Any]]:
    """All samplers at the times that the planner takes for some numbers of trials, and when its tables are made."""
    planner = curves[PLANNER]
    counts = [count for count in COMPARED if count <= planner.percent.shape[1]]
    # Just before the first trial that was planned with them.
    made = [count for count in dict.fromkeys(planner.begun) if count < planner.seconds.shape[1]]
    times = [(count, float(planner.seconds[:, count].min()) - 1e-6) for count in made]
    times += [(count, float(planner.seconds[:, count - 1].mean())) for count in counts]
    return [_at_time(curves, *time) for time in times]


def _trials_to_equal(planner: Curves, other: Curves) -> int | None:
    """Trials after which the planner's mean is that of another sampler at its end; None if it never is."""
    reached = np.flatnonzero(planner.percent.mean(axis=0) >= other.percent[:, -1].mean())
    return int(reached[0]) + 1 if len(reached) else None


def _at_time(curves: Mapping[str, Curves], count: int, seconds: float) -> dict[str, Any]:
    """All samplers at the time that the planner takes for some trials."""
    ended = [sampler for sampler, found in curves.items() if found.seconds[:, -1].max() < seconds]
    found = {sampler: one.at_time(seconds) for sampler, one in curves.items()}
    # One whose run was over by then might have gone on.
    return {"seconds": seconds, "planner_trials": count, "runs_over": ended, **_ranking(found)}


def _ranking(found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Mean percent of every sampler, the best first, and whether the planner is ahead of every other; a tie is not ahead."""
    means = {sampler: float(percent.mean()) for sampler, percent in found.items()}
    ranked = dict(sorted(means.items(), key=lambda item: -item[1]))
    ahead = all(means[PLANNER] > mean for sampler, mean in means.items() if sampler != PLANNER)
    return {"planner_ahead": ahead, "hypervolume_pct": ranked}


def spread(values: np.ndarray) -> float:
    """Standard deviation over seeds; 0 for a single one."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0
