"""What early stopping saves, and what it costs: the same searches with and without it; prints JSON.

    python tests/bench/stopping.py --problem demo --measured FOLDER --samplers planner,tpe --seeds 10

Modules are measured on all images once, as by `search.py`, whose FOLDER this shares; what each of them answered is kept,
so that the stopping rule sees block by block what it would have seen of the running module.

images_share       Image evaluations with early stopping, as a share of those without it.
hypervolume_pct    Of the front with early stopping, in percent of that without it, after equally many trials.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
from campaign import anchored, kept_run, made_study, search
from measured import Measured
from problems import Problem, add_options, open_problem

from qsearch.config import QuantConfig
from qsearch.errors import QSearchError
from qsearch.measure.image_blocks import ImageHistory, Tally
from qsearch.measure.measurement import Measurement
from qsearch.search.front import hypervolume
from qsearch.search.loop.driver import Limits, SearchProblem
from qsearch.search.loop.early_stopping import StoppingRule
from qsearch.search.samplers import PLANNER
from qsearch.search.study_trials import measured_trials


def compare_one(problem: Problem, sampler: str, seed: int, trials: int) -> dict[str, Any]:
    """One search without early stopping, and one with it."""
    full = kept_run(problem, sampler, seed, trials)
    handle = made_study(problem, sampler)
    history = ImageHistory(problem.float_run.logits, problem.float_run.labels)

    def evaluate(config: QuantConfig, rule: StoppingRule) -> Measurement:
        return replay(history, problem.measured.with_answers(config), rule)

    searched = SearchProblem(problem.space, evaluate, early_stopping=True, anchored=anchored(sampler))
    search(problem, handle, searched, sampler, Limits(trials, seed=seed))
    tried = measured_trials(handle.study)
    completed = [trial.user_attrs["config_hash"] for trial in tried if trial.values]
    images = np.mean([trial.user_attrs["images"] for trial in tried])
    before = _hypervolume(problem, full.digests)
    return {
        "sampler": sampler,
        "seed": seed,
        "trials": len(tried),
        "stopped_early": len(tried) - len(completed),
        "images_share": float(images) / problem.images,
        "hypervolume_pct": 100.0 * _hypervolume(problem, completed) / before,
    }


def replay(history: ImageHistory, found: Measured, rule: StoppingRule) -> Measurement:
    """Show a rule a finished measurement as it came about.

    Raises:
        EarlyStop: It would have ended early.
    """
    assert found.answers is not None
    latency, memory = found.measurement.latency, found.measurement.memory
    rule.check(latency, memory)
    run = Tally(len(found.answers.right))
    try:
        for block in history.blocks():
            run.add(block, found.answers.right[block], found.answers.nats[block])
            if not run.seen.all():
                rule.check(latency, memory, history.seen(run))
    finally:
        history.keep(run)
    return found.measurement


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the seeds of each sampler."""
    found = []
    for sampler in dict.fromkeys(row["sampler"] for row in rows):
        of = [row for row in rows if row["sampler"] == sampler]
        shares, percent = [row["images_share"] for row in of], [row["hypervolume_pct"] for row in of]
        numbers = {"images_share_mean": np.mean(shares), "images_share_max": max(shares)}
        numbers |= {"hypervolume_pct_mean": np.mean(percent), "hypervolume_pct_min": min(percent)}
        found.append({"sampler": sampler, "seeds": len(of), **{name: float(value) for name, value in numbers.items()}})
    return found


def _hypervolume(problem: Problem, digests: Iterable[str]) -> float:
    return hypervolume((problem.measured.known[digest] for digest in digests), problem.baseline)  # type: ignore[misc]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--samplers", default=f"{PLANNER},tpe", help="separated by commas")
    parser.add_argument("--seeds", type=int, default=10, help="searches of each sampler")
    parser.add_argument("--trials", type=int, default=200, help="trials of each search, stopped ones included")
    options = parser.parse_args()
    try:
        problem = open_problem(options)
    except QSearchError as error:
        sys.exit(f"error: {error}")
    rows = []
    for seed in range(options.seeds):
        for sampler in options.samplers.split(","):
            rows.append(compare_one(problem, sampler, seed, options.trials))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"problem": problem.name, "summary": summary(rows), "results": rows}, indent=1))


if __name__ == "__main__":
    main()
