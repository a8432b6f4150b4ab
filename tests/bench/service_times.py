"""What the steps of a trial take, measured: the service times that `simulation.py` draws from. Prints JSON.

    python tests/bench/service_times.py --problem demo --trials 60 --out tests/bench/service_times.json
    python tests/bench/service_times.py --problem small --trials 60 --out tests/bench/service_times.json
    python tests/bench/service_times.py --study demo=sqlite:////there/studies/demo.db --out tests/bench/service_times.json

A problem is searched through the real loop by one process, with the planner, early stopping, notes and pictures, over SQLite,
and every step of every trial is timed. Kernels were compiled by the planner's tables, or are in the cache. What the process
waited for a processor that others had is taken off, as Linux counts it: on a busy machine times are those of an idle one, nearly
(caches and memory are shared all the same). `--study` keeps the rate of a search that `search` made, to compare the simulation
with. Storages are timed by `storage_times.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import sqlalchemy
from problems import _settings
from storage_times import Stopwatch, keep, provenance

from qsearch.measure.devices.device import Device
from qsearch.report.notes import TrialNotes
from qsearch.search.bound_space import bind_space
from qsearch.search.evaluation.objective import ModelEvaluator, open_evaluator
from qsearch.search.loop.driver import Limits, SearchProblem, run_search
from qsearch.search.loop.trial_book import TrialBook
from qsearch.search.planner import PlannerSampler
from qsearch.search.study import Identity, StudyHandle, load_study, study_to_search

KEPT_DIGITS = 5


@dataclass
class Watch:
    """Seconds of every step of the trials, in order."""

    rows: list[dict[str, float]] = field(default_factory=list)
    transactions: dict[str, list[int]] = field(default_factory=lambda: {"ask": [], "tell": []})
    commits: int = 0
    latency: float = 0.0
    accuracy: float | None = None
    scoring: Stopwatch = field(default_factory=Stopwatch)

    def begin(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Time the asking."""

        def run(book: TrialBook, known: Any) -> Any:
            watch, commits = Stopwatch(), self.commits
            begun = real(book, known)
            # A configuration that is known is asked for in vain; the trial after it has that time too.
            before = self.rows.pop()["ask"] if self.rows and set(self.rows[-1]) == {"ask"} else 0.0
            self.rows.append({"ask": before + watch.seconds})
            self.transactions["ask"].append(self.commits - commits)
            return begun

        return run

    def conclude(self, real: Callable[..., None]) -> Callable[..., None]:
        """Time the telling."""

        def run(book: TrialBook, begun: Any, ended: Any) -> None:
            watch, commits = Stopwatch(), self.commits
            real(book, begun, ended)
            self.rows[-1]["tell"] = watch.seconds
            self.transactions["tell"].append(self.commits - commits)

        return run

    def evaluate(self, evaluator: ModelEvaluator) -> Callable[..., Any]:
        """Build and measure, as `ModelEvaluator.evaluate` does, and time both."""
        watch = self

        class Timed:
            """The device, its seconds noted."""

            def __getattr__(self, name: str) -> Any:
                return getattr(evaluator.device, name)

            def paired(self, *given: Any) -> Any:
                # Timed a second time, it has been scored.
                if watch.latency and watch.accuracy is None:
                    watch.accuracy = watch.scoring.seconds
                timer = Stopwatch()
                found = evaluator.device.paired(*given)
                watch.latency, watch.scoring = watch.latency + timer.seconds, Stopwatch(every=True)
                return found

        timed: Device = Timed()  # type: ignore[assignment]
        measurer = replace(evaluator.measurer, device=timed)

        def run(config: Any, rule: Any = None) -> Any:
            timer = Stopwatch()
            prepared = evaluator._builder.prepare(config)
            row = {"build": timer.seconds}
            self.latency, self.accuracy = 0.0, None
            try:
                return measurer.measure(prepared, rule)
            finally:
                accuracy = self.scoring.seconds if self.accuracy is None else self.accuracy
                self.rows[-1] |= row | {"latency": self.latency, "accuracy": accuracy}

        return run


@contextlib.contextmanager
def new_study() -> Iterator[StudyHandle]:
    """A study in SQLite."""
    with (
        tempfile.TemporaryDirectory() as folder,
        study_to_search("bench", Identity({"model": "bench"}), f"sqlite:///{folder}/study.db") as handle,
    ):
        yield handle


def measure_problem(name: str, root: Path, trials: int, seed: int) -> dict[str, Any]:
    """Search it both ways."""
    settings, space = _settings(name, root, None, root / "cache")
    evaluator = open_evaluator(settings, lambda clause: None)
    bound = bind_space(space, evaluator.graph, evaluator.idle_methods)
    tables = evaluator.tables(bound)
    watch = Watch()
    with (
        new_study() as handle,
        mock.patch.object(TrialBook, "_begin", watch.begin(TrialBook._begin)),
        mock.patch.object(TrialBook, "conclude", watch.conclude(TrialBook.conclude)),
    ):
        handle.study.sampler = PlannerSampler(bound, tables, seed)
        sqlalchemy.event.listen(handle.storage._backend.engine, "commit", lambda _: count(watch))  # type: ignore[attr-defined]
        notes = TrialNotes(handle, evaluator.graph, evaluator.baseline)
        problem = SearchProblem(bound, watch.evaluate(evaluator), notes, early_stopping=True, anchored=False)
        run_search(handle, problem, Limits(trials, seed=seed))
    counts = {step: sum(found) / trials for step, found in watch.transactions.items()}
    rows = [{name: round(seconds, KEPT_DIGITS) for name, seconds in row.items()} for row in watch.rows if "tell" in row]
    return {**provenance(), "trials": len(rows), "transactions": counts, "rows": rows}


def rate_of(name: str, url: str) -> dict[str, Any]:
    """Trials per minute of a search in two processes that has ended, from its first trial to its last."""
    trials = [one for one in load_study(name, url).study.get_trials() if one.datetime_start and one.datetime_complete]
    first, last = min(one.datetime_start for one in trials), max(one.datetime_complete for one in trials)  # type: ignore[type-var]
    seconds = (last - first).total_seconds()  # type: ignore[operator]
    return {"date": last.date().isoformat(), "trials": len(trials), "trials_per_minute": round(60 * len(trials) / seconds, 2)}  # type: ignore[union-attr]


def count(watch: Watch) -> None:
    """One more transaction."""
    watch.commits += 1


def main() -> None:
    """Measure, and keep what was found beside what was found before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=("demo", "small"))
    parser.add_argument("--study", metavar="NAME=URL", help="a finished search of the problem of that name")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measured", type=Path, default=Path("studies/bench"), help="folder of caches")
    parser.add_argument("--out", type=Path, required=True, help="file that what is found is added to")
    options = parser.parse_args()
    if options.problem:
        found = measure_problem(options.problem, options.measured, options.trials, options.seed)
        keep(options.out, "workloads", options.problem, found)
    if options.study:
        name, _, url = options.study.partition("=")
        keep(options.out, "searches", name, rate_of(name, url))


if __name__ == "__main__":
    main()
