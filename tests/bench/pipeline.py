"""Trials per minute of the two-core pipeline against the serial loop on one core and on all; prints JSON.

    python tests/bench/pipeline.py --model demo --trials 12 --json
    python tests/bench/pipeline.py --model efficientnet_lite0 --data ../shared/data/nips2017 --trials 12 --json

All run the same configurations through the real driver, each time into a new study in SQLite with notes and pictures, in
stretches that take turns. They are those that the sampler proposed in a search before the clock runs; it is asked all the
same, and has its tables by then. `serial` is one process on one core, accuracy on one worker; `jobs1` is what `--jobs 1`
does, one process that scores images on every core. Kernels are compiled and the worker process is ready before the clock
runs. Latencies of the same configuration are compared between the pipeline and one core.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from qsearch.measure.measurement import Measurement
from qsearch.report.notes import TrialNotes
from qsearch.search.bound_space import BoundSpace, bind_space
from qsearch.search.evaluation.evaluator import Settings
from qsearch.search.evaluation.objective import ModelEvaluator, open_evaluator
from qsearch.search.front import measurement_from_json
from qsearch.search.loop.driver import Limits, SearchProblem, run_search
from qsearch.search.loop.processors import check_jobs
from qsearch.search.planner import PlannerSampler
from qsearch.search.samplers import PLANNER, make_sampler
from qsearch.search.space import load_space
from qsearch.search.study import Identity, StudyHandle, study_to_search
from qsearch.search.study_trials import finished

MODES = ("serial", "jobs1", "pipelined")


class Asking(optuna.samplers.BaseSampler):
    """Has a sampler propose as a search does, and gives out the next of some proposals that were made before."""

    def __init__(self, sampler: optuna.samplers.BaseSampler, space: BoundSpace, values: list[dict[str, Any]]) -> None:
        self.sampler, self.space, self.values = sampler, space, iter(values)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        """All parameters at once."""
        return self.space.distributions()

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        """The next of them."""
        self.sampler.sample_relative(study, trial, self.sampler.infer_relative_search_space(study, trial))
        return next(self.values)

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
        """Never asked."""
        raise NotImplementedError(param_name)


@dataclass
class Bench:
    """What is run, and what was found.

    Attributes:
        evaluator: The model.
        space: Its default space.
        make_sampler: Makes the sampler that is asked.
        early_stopping: Whether trials may end early.
        confirmed: Whether what reaches the front is timed again.
        values: Parameter values of the trials.
        seconds: Mode -> wall time of each stretch.
        found: Mode -> configuration -> its measurements.
    """

    evaluator: ModelEvaluator
    space: BoundSpace
    make_sampler: Callable[[], optuna.samplers.BaseSampler]
    early_stopping: bool
    confirmed: bool
    values: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    found: dict[str, dict[str, list[Measurement]]] = field(default_factory=lambda: {mode: {} for mode in MODES})

    def draw(self, trials: int) -> None:
        """Search once, for the configurations."""
        with _new_study() as handle:
            handle.study.sampler = self.make_sampler()
            run_search(handle, SearchProblem(self.space, self.evaluator.evaluate, anchored=False), Limits(trials))
            self.values = [trial.params for trial in finished(handle.study)]

    def stretch(self, mode: str) -> None:
        """Run all trials once."""
        with contextlib.ExitStack() as stack:
            handle = stack.enter_context(_new_study())
            handle.study.sampler = Asking(self.make_sampler(), self.space, self.values)
            pipeline = None
            if mode == "serial":
                stack.enter_context(_on({max(os.sched_getaffinity(0))}))
            elif mode == "pipelined":
                pipeline = stack.enter_context(self.evaluator.pipeline(2))
                assert pipeline is not None
                pipeline.result(pipeline.measure(pipeline.pack(self.space.config(self.values[0])), None))
            notes = TrialNotes(handle, self.evaluator.graph, self.evaluator.baseline)
            options = {"early_stopping": self.early_stopping, "confirmed": self.confirmed, "pipeline": pipeline}
            problem = SearchProblem(self.space, self.evaluator.evaluate, notes, anchored=False, **options)
            start = time.monotonic()
            run_search(handle, problem, Limits(len(self.values)))
            self.seconds[mode].append(time.monotonic() - start)
            print(f"{mode}: {60 * len(self.values) / self.seconds[mode][-1]:.1f} trials per minute", file=sys.stderr)
            for trial in finished(handle.study):
                measured = measurement_from_json(trial.user_attrs["measurement"])
                self.found[mode].setdefault(trial.user_attrs["config_hash"], []).append(measured)


@contextlib.contextmanager
def _new_study() -> Iterator[StudyHandle]:
    with (
        tempfile.TemporaryDirectory() as folder,
        study_to_search("bench", Identity({"model": "bench"}), f"sqlite:///{folder}/study.db") as handle,
    ):
        yield handle


@contextlib.contextmanager
def _on(cores: set[int]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def report(bench: Bench, model: str) -> dict[str, Any]:
    """Trials per minute, shares of the phases, agreement of latencies."""
    count = len(bench.values)
    rates = {mode: [60 * count / one for one in bench.seconds[mode]] for mode in MODES}
    ratios = {mode: np.divide(bench.seconds[mode], bench.seconds["pipelined"]) for mode in MODES if mode != "pipelined"}
    return {
        "model": model,
        "trials": count,
        "early_stopping": bench.early_stopping,
        "confirmed": bench.confirmed,
        "trials_per_minute": {mode: [round(one, 1) for one in rates[mode]] for mode in MODES},
        # Of the pipeline's rate to that of each other mode.
        "ratio": {mode: round(float(np.median(found)), 3) for mode, found in ratios.items()},
        "ratios": {mode: [round(float(one), 3) for one in found] for mode, found in ratios.items()},
        "ms_per_trial": {mode: phases(bench, mode) for mode in MODES},
        "latency": agreement(bench),
    }


def phases(bench: Bench, mode: str) -> dict[str, float]:
    """Mean milliseconds of each phase of a completed trial, and of a trial as a whole."""
    found = [one for measured in bench.found[mode].values() for one in measured]
    names = ("lower", "build", "latency", "accuracy")
    means = {name: round(1e3 * float(np.mean([one.seconds[name] for one in found])), 1) for name in names}
    return means | {"trial": round(1e3 * float(np.mean(bench.seconds[mode])) / len(bench.values), 1)}


def agreement(bench: Bench) -> dict[str, float]:
    """How far the latencies of the same configuration are apart, by itself and in units of its spread."""
    apart, ratio, repeat, noisy = [], [], [], []
    for digest in bench.found["serial"].keys() & bench.found["pipelined"].keys():
        serial, pipelined = (bench.found[mode][digest] for mode in ("serial", "pipelined"))
        one, other = (float(np.median([each.latency.median_ms for each in of])) for of in (serial, pipelined))
        spread = float(np.median([each.latency.spread_ms for each in (*serial, *pipelined)]))
        apart.append(abs(one - other) / spread)
        ratio.append(other / one)
        repeat += [each.latency.spread_ms / each.latency.median_ms for each in serial]
        noisy += [each.latency.noisy for each in (*serial, *pipelined)]
    return {
        "pipelined_over_serial_median": round(float(np.median(ratio)), 4),
        "pipelined_over_serial_p10": round(float(np.percentile(ratio, 10)), 4),
        "pipelined_over_serial_p90": round(float(np.percentile(ratio, 90)), 4),
        "relative_spread_median": round(float(np.median(repeat)), 4),
        "apart_in_spreads_median": round(float(np.median(apart)), 3),
        "within_spread_pct": round(100 * float(np.mean(np.array(apart) <= 1.0)), 1),
        "within_two_spreads_pct": round(100 * float(np.mean(np.array(apart) <= 2.0)), 1),
        "noisy_pct": round(100 * float(np.mean(noisy)), 1),
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--trials", type=int, default=12, help="configurations of a stretch")
    parser.add_argument("--rounds", type=int, default=3, help="stretches of each kind")
    parser.add_argument("--sampler", default=PLANNER, choices=[PLANNER, "random"])
    parser.add_argument("--early-stopping", action="store_true")
    parser.add_argument("--confirmed", action="store_true", help="time what reaches the front again, as a search does")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument("--cache", type=Path, default=Path("studies/cache"))
    return parser.parse_args()


def main() -> None:
    """Run the comparison."""
    options = parse()
    check_jobs(2, 1)
    evaluator = open_evaluator(
        Settings(options.model, data=options.data, cache_dir=options.cache), lambda clause: print(clause, file=sys.stderr)
    )
    space = bind_space(load_space("default"), evaluator.graph)
    tables = evaluator.tables(space) if options.sampler == PLANNER else None
    bench = Bench(
        evaluator,
        space,
        lambda: PlannerSampler(space, tables, 0) if tables else make_sampler("random", 0, 0),
        options.early_stopping,
        options.confirmed,
    )
    bench.draw(options.trials)
    for index in range(options.rounds):
        for mode in MODES if index % 2 == 0 else reversed(MODES):
            bench.stretch(mode)
    found = report(bench, options.model)
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:20} {value}")


if __name__ == "__main__":
    main()
