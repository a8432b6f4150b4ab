"""The planner against the usual samplers, on real measurements; prints JSON.

    python tests/bench/search.py --problem small --measured FOLDER --enumerate
    python tests/bench/search.py --problem demo --measured FOLDER --fill 2000
    python tests/bench/search.py --problem demo --measured FOLDER --seeds 10 --plot curves.png --json
    python tests/bench/search.py --problem demo --space full --measured FOLDER --seeds 10 --json

Every run goes through the loop of `qsearch search`, starting points of the usual samplers included (`tpe-plain` is TPE
without them), over an in-memory study and without early stopping; what reaches a run's front is timed again, as by a search.
Measurements are kept in FOLDER by configuration and shared by all runs, as are the finished runs: the same command again
adds only what is missing. --enumerate, --fill and --settle only measure; they may be killed at any moment, and several may
run at once. --settle belongs before the runs and after them: it times what is near the front of all that is known, and what
is on a run's own, eleven times, since the best of thousands of single timings is mostly luck; the middle one counts. On a busy
machine the rest deserves more than one as well: --settle 3. --time-fronts N comes last, with the samplers and seeds of the runs:
it times their fronts and the reference's in N rounds, which only value what the other timings have picked.

results            Hypervolume in percent of the reference's, over seeds; the reference is everything measured: for `small`
                   the whole space, once enumerated, for the others the union of all runs, those of earlier versions and other
                   samplers included, and of --fill. `of_runs`: of the union of the runs that are compared here. `fresh`: both
                   fronts valued by the rounds of --time-fronts, see `fresh_timings.py`.
seconds            Processor seconds: what each trial took when it was measured, and what sampler and loop took; the
                   planner's with its opening and its tables, measured with an empty kernel cache. Trials find most of their
                   kernels compiled, which these had to compile: that is counted against the planner. The pauses within a
                   timing, about 0.1 s a trial, are no work of a processor and are left out.
verdicts           The planner's trials to equal random's last; who leads at 25, 50, 100 and 200 trials; who leads when the
                   planner's tables are done and at the time that it takes for these trials. `runs_over` are those that would
                   have had time for more trials.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TVM_NUM_THREADS", "1")

from campaign import PLAIN, Run, fill, kept_run, measure_all, settle
from fresh_timings import fresh_results, time_fronts
from problems import Problem, add_options, open_problem
from verdicts import Curves, curves_of, reference_hypervolume, results, verdicts

from qsearch.errors import QSearchError
from qsearch.search.samplers import PLANNER, SAMPLERS


def made_runs(problem: Problem, samplers: list[str], seeds: int, trials: int) -> dict[str, list[Run]]:
    """Sampler -> its runs, those that there are and new ones."""
    runs: dict[str, list[Run]] = {sampler: [] for sampler in samplers}
    for seed in range(seeds):
        # Seed by seed: what there is of a campaign that was ended early is then of all samplers alike.
        for sampler in samplers:
            runs[sampler].append(kept_run(problem, sampler, seed, trials))
            print(f"{problem.name}: {sampler}, seed {seed}", file=sys.stderr, flush=True)
    return runs


def compare(problem: Problem, samplers: list[str], seeds: int, trials: int) -> tuple[dict[str, Any], dict[str, Curves]]:
    """Run the samplers, or take the runs that there are.

    Args:
        problem: What is searched.
        samplers: Their names.
        seeds: Runs of each, seeds 0 and up.
        trials: Measured configurations of each run.

    Returns:
        The document, and sampler -> its curves.
    """
    runs = made_runs(problem, samplers, seeds, trials)
    curves, fresh = {sampler: curves_of(problem, found) for sampler, found in runs.items()}, fresh_results(problem, runs)
    reference = reference_hypervolume(problem)
    compared = {digest for found in runs.values() for run in found for digest in run.digests}
    of_runs = reference_hypervolume(problem, compared)
    document = {
        "problem": problem.name,
        "seeds": seeds,
        "reference": {
            "configurations": len(problem.measured.known),
            "combinations": problem.space.size,
            "hypervolume": reference,
            "of_runs": {"configurations": len(compared), "hypervolume": of_runs},
        },
        "results": [row | fresh[row["sampler"], row["trials"]] for row in results(curves, reference / of_runs)],
        "verdicts": verdicts(curves),
    }
    if PLANNER in curves:
        cost = problem.tables()
        document["tables_seconds"] = {
            "of_opening": cost.opening_s,
            "of_parts": [seconds for _, seconds in cost.parts],
        }
    return document, curves


def table(document: dict[str, Any]) -> str:
    """The results as text."""
    rows = [
        f"{row['sampler']:<14} {row['trials']:>4} {row['hypervolume_pct_mean']:7.2f} +- {row['hypervolume_pct_std']:5.2f} % "
        f"(of runs {row['hypervolume_pct_of_runs_mean']:7.2f} +- {row['hypervolume_pct_of_runs_std']:5.2f}, "
        f"{_fresh(row)}) {row['seconds']:8.1f} s"
        for row in document["results"]
    ]
    known, compared = (one["configurations"] for one in (document["reference"], document["reference"]["of_runs"]))
    head = f"{document['problem']}: {document['seeds']} seeds, {known} configurations known, {compared} of them from these runs"
    return "\n".join([head, *rows])


def _fresh(row: dict[str, Any]) -> str:
    if not row["fresh_rounds"]:
        return "fresh: not timed"
    return f"fresh {row['hypervolume_pct_fresh_mean']:7.2f} +- {row['hypervolume_pct_fresh_std']:5.2f}"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--seeds", type=int, default=10, help="runs of each sampler")
    parser.add_argument("--trials", type=int, default=200, help="measured configurations of each run")
    parser.add_argument("--samplers", default=",".join((PLANNER, *SAMPLERS)), help=f"separated by commas; see also NAME{PLAIN}")
    parser.add_argument("--enumerate", action="store_true", help="only measure: every configuration")
    parser.add_argument("--fill", type=int, metavar="N", help="only measure: until N configurations are known")
    parser.add_argument(
        "--settle",
        type=int,
        nargs="?",
        const=1,
        metavar="N",
        help="only measure: time the fronts of what is known and of the runs again, and the rest N times in all",
    )
    parser.add_argument(
        "--time-fronts", type=int, metavar="N", help="only measure: fronts of the runs, N rounds that only value them"
    )
    parser.add_argument("--plot", type=Path, help="write the curves to this PNG file")
    parser.add_argument("--json", action="store_true", help="print the document instead of a table")
    options = parser.parse_args()
    known = {*SAMPLERS, *(name + PLAIN for name in SAMPLERS), PLANNER}
    options.samplers = options.samplers.split(",")
    if unknown := sorted(set(options.samplers) - known):
        parser.error(f"no sampler {unknown[0]!r}; there are: {', '.join(sorted(known))}")
    if options.enumerate and (options.problem != "small" or options.space):
        parser.error("only the own space of 'small' can be enumerated; measure some of the others with --fill N")
    return options


def main() -> None:
    """Measure, run, print."""
    options = arguments()
    try:
        problem = open_problem(options)
    except QSearchError as error:
        sys.exit(f"error: {error}")
    if options.enumerate:
        measure_all(problem)
    if options.fill:
        fill(problem, options.fill)
    if options.settle:
        settle(problem, options.settle)
    if options.enumerate or options.fill or options.settle:
        return
    if options.time_fronts:
        time_fronts(problem, made_runs(problem, options.samplers, options.seeds, options.trials), options.time_fronts)
        return
    document, curves = compare(problem, options.samplers, options.seeds, options.trials)
    if options.plot:
        from curves_plot import draw_curves

        draw_curves(curves, document).save(options.plot)
    print(json.dumps(document, indent=1) if options.json else table(document))


if __name__ == "__main__":
    main()
