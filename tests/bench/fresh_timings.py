"""Hypervolume without luck: what fronts are worth by timings that had no part in picking them.

The front of thousands of configurations holds those that were timed at lucky moments, however often each is timed, and counts
for more than its modules are worth; a sampler that tries two hundred has fewer to be lucky with. What picks a front must
therefore not be what values it, as with training and test data. A round times all that is on a front once, in random order and
in one process: what process and machine are off by is off for all alike. Only whole rounds count.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from campaign import Run, front_of
from measured import read_lines
from problems import Problem
from verdicts import TRIALS, spread

from qsearch.search.front import objective_hypervolume

__all__ = ["fresh_results", "time_fronts"]

FOLDER = "fresh"


def time_fronts(problem: Problem, runs: Mapping[str, Sequence[Run]], rounds: int) -> None:
    """Time what is on the reference's front and on those of runs, in whole rounds.

    Args:
        problem: What was searched.
        runs: Sampler -> one run per seed.
        rounds: How many.
    """
    measured = problem.measured
    fronts = [
        _reference(problem),
        *(front for found in runs.values() for run in found for front in _fronts(problem, run).values()),
    ]
    # Of those that run the same instructions, one.
    among = list({measured.instructions(digest): digest for front in fronts for digest in front}.values())
    folder, rng = problem.folder / FOLDER, np.random.default_rng(time.time_ns())
    folder.mkdir(exist_ok=True)
    file = folder / f"{time.time_ns():x}-{os.getpid()}.jsonl"
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}: timing {len(among)} configurations", file=sys.stderr, flush=True)
        order = [among[place] for place in rng.permutation(len(among))]
        found = {digest: measured.on_clock(measured.source.time(measured.known[digest].config)).median_ms for digest in order}
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(found) + "\n")


def fresh_results(problem: Problem, runs: Mapping[str, Sequence[Run]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Hypervolume in percent of what the reference's front is worth, both by the median over rounds.

    Args:
        problem: What was searched.
        runs: Sampler -> one run per seed.

    Returns:
        (sampler, trials) -> `fresh_rounds`, those that timed all of a sampler's fronts and the reference's, and, unless
        there are none, `hypervolume_pct_fresh_mean` and `_std` over seeds.
    """
    rounds = _rounds(problem)
    results: dict[tuple[str, int], dict[str, Any]] = {}
    for sampler, found in runs.items():
        fronts, reference = [_fronts(problem, run) for run in found], _reference(problem)
        needed = {
            problem.measured.instructions(digest)
            for front in (reference, *(f for one in fronts for f in one.values()))
            for digest in front
        }
        whole = [one for one in rounds if needed <= one.keys()]
        latencies = {key: float(np.median([one[key] for one in whole])) for key in needed} if whole else {}
        for count in TRIALS:
            if not all(count in one for one in fronts):
                continue
            results[sampler, count] = {"fresh_rounds": len(whole)}
            if whole:
                percent = np.array([_worth(problem, one[count], latencies) for one in fronts])
                percent *= 100 / _worth(problem, reference, latencies)
                results[sampler, count] |= {
                    "hypervolume_pct_fresh_mean": float(percent.mean()),
                    "hypervolume_pct_fresh_std": spread(percent),
                }
    return results


def _reference(problem: Problem) -> list[str]:
    return front_of(problem, problem.measured.known)


def _fronts(problem: Problem, run: Run) -> dict[int, list[str]]:
    """Number of trials -> what is on the front of as many."""
    return {count: front_of(problem, run.digests[:count]) for count in TRIALS if count <= len(run.digests)}


def _rounds(problem: Problem) -> list[dict[tuple[str, int], float]]:
    """What each whole round timed, milliseconds, by what it runs."""
    measured = problem.measured
    lines = [line for file in sorted((problem.folder / FOLDER).glob("*.jsonl")) for line in read_lines(file)]
    return [{measured.instructions(digest): ms for digest, ms in line.items() if digest in measured.known} for line in lines]


def _worth(problem: Problem, front: Iterable[str], latencies: Mapping[tuple[str, int], float]) -> float:
    known = problem.measured
    points = [(latencies[known.instructions(digest)], *known.known[digest].objectives[1:]) for digest in front]
    return objective_hypervolume(np.array(points), problem.baseline)
