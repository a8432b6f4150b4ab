"""Hypervolume without luck: fronts are picked by one half of every module's timings and valued by the other.

The front of thousands of configurations holds the luckiest, however often each is timed, and counts for more than its modules
are worth; a sampler that tries two hundred has fewer to be lucky with. What picks a front must therefore not be what values it
(as in cross-validation). Of a module that was timed once both halves are that timing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import moocore
import numpy as np
from campaign import Run
from problems import Problem
from verdicts import TRIALS, spread

from qsearch.search.front import objective_hypervolume

__all__ = ["split_results"]

DRAWS = 16


def split_results(
    problem: Problem, runs: Mapping[str, Sequence[Run]], draws: int = DRAWS
) -> dict[tuple[str, int], dict[str, float]]:
    """Hypervolume in percent of what the reference's front is worth, both picked by one half and valued by the other.

    Args:
        problem: What was searched.
        runs: Sampler -> one run per seed.
        draws: Ways to halve the timings, over which a seed's percent is a mean.

    Returns:
        (sampler, trials) -> `hypervolume_pct_split_mean` and `_std` over seeds.
    """
    known = problem.measured.known
    place = {digest: n for n, digest in enumerate(known)}
    rest = np.array([one.objectives[1:] for one in known.values()])
    tried = {sampler: [np.array([place[digest] for digest in run.digests]) for run in found] for sampler, found in runs.items()}
    shortest = {sampler: min(map(len, found)) for sampler, found in tried.items()}
    percent: dict[tuple[str, int], list[list[float]]] = {
        (sampler, count): [] for sampler in runs for count in TRIALS if count <= shortest[sampler]
    }
    rng = np.random.default_rng(0)
    for _ in range(draws):
        picking, valuing = (np.column_stack([half, rest]) for half in _halves(problem, rng))

        def worth(among: np.ndarray, picking: np.ndarray = picking, valuing: np.ndarray = valuing) -> float:
            front = among[moocore.is_nondominated(picking[among])]
            return objective_hypervolume(valuing[front], problem.baseline)

        reference = worth(np.arange(len(known)))
        for (sampler, count), rows in percent.items():
            rows.append([100 * worth(one[:count]) / reference for one in tried[sampler]])
    means = {key: np.mean(rows, axis=0) for key, rows in percent.items()}
    return {
        key: {"hypervolume_pct_split_mean": float(found.mean()), "hypervolume_pct_split_std": spread(found)}
        for key, found in means.items()
    }


def _halves(problem: Problem, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Latencies of all that is known by either half of the timings, float64 (N,) each; twins share theirs."""
    halves: dict[Any, tuple[float, float]] = {}
    keys = [problem.measured.instructions(digest) for digest in problem.measured.known]
    for digest, key in zip(problem.measured.known, keys, strict=True):
        if key not in halves:
            timings = rng.permutation(problem.measured.quiet_ms(digest))
            parts = (timings[: len(timings) // 2], timings[len(timings) // 2 :]) if len(timings) > 1 else (timings, timings)
            halves[key] = float(np.median(parts[0])), float(np.median(parts[1]))
    first, second = np.array([halves[key] for key in keys]).T
    return first, second
