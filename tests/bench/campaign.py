"""Runs of samplers through the product's own search loop, and measurements made ahead of them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import moocore
import numpy as np
import optuna
from measured import Measured, cpu_seconds
from problems import Problem, source_digest, write_json

from qsearch.config import QuantConfig
from qsearch.errors import TrialError
from qsearch.measure.kernel_times import METHOD
from qsearch.measure.measurement import Measurement
from qsearch.search.anchors import enqueue
from qsearch.search.bound_space import CALIBRATION, GRANULARITY, PERCENTILE_TAIL, WEIGHT_SCALE, BoundSpace
from qsearch.search.evaluation.module_measurer import AGAIN
from qsearch.search.loop.driver import Limits, SearchProblem, run_search
from qsearch.search.planner import PlannerSampler, drafted_trials, tried_configs
from qsearch.search.proposals import unseen_values
from qsearch.search.samplers import PLANNER, SAMPLERS, derived_seed, make_sampler
from qsearch.search.study import StudyHandle

__all__ = ["PLAIN", "Run", "anchored", "fill", "front_of", "kept_run", "made_study", "measure_all", "search", "settle"]

# Appended to a sampler's name: without the starting points that `search` gives the usual samplers.
PLAIN = "-plain"
# How often other processes' measurements are looked at, in measurements.
REFRESH = 50
# Of a configuration on a front: with one each, the front of thousands would be that of the luckiest. Some are off it for
# bad luck; that of a single timing is mostly less than NEAR, a share of the latency, and falls with their number's root.
TIMINGS, NEAR = 11, 0.02


@dataclass(frozen=True)
class Run:
    """One search.

    Attributes:
        sampler: Its name.
        seed: Its seed.
        digests: Content hashes of the measured configurations, in the order of trials.
        seconds: Processor seconds from the begin of the search to the end of each of them, float each: what the trials
            took when they were measured, what sampler and loop took now. The tables of a planner are not among them.
        opening: How many of them came before the draft of the tables at least.
    """

    sampler: str
    seed: int
    digests: list[str]
    seconds: list[float]
    opening: int = 0


def kept_run(problem: Problem, sampler: str, seed: int, trials: int) -> Run:
    """A run that was made before, or a new one.

    Args:
        problem: What is searched.
        sampler: One of qsearch's, or one with PLAIN at its end.
        seed: Of the sampler.
        trials: How many configurations to measure.
    """
    problem.measured.refresh()
    path = problem.folder / "runs" / f"{sampler}-{_version(sampler)}-{AGAIN}-{seed}.json"
    if path.is_file():
        found = Run(**json.loads(path.read_text(encoding="utf-8")))
        if len(found.digests) >= trials and all(digest in problem.measured.known for digest in found.digests):
            return replace(found, digests=found.digests[:trials], seconds=found.seconds[:trials])
    run = _run(problem, sampler, seed, trials)
    write_json(path, asdict(run))
    return run


def made_study(problem: Problem, sampler: str) -> StudyHandle:
    """A study in memory; what a planned one begins with is enqueued."""
    study = optuna.create_study(directions=["minimize"] * 3)
    if sampler == PLANNER:
        enqueue(study, problem.tables().first)
    return StudyHandle(study, "sqlite:///in-memory.db")


def search(problem: Problem, handle: StudyHandle, searched: SearchProblem, sampler: str, limits: Limits) -> None:
    """Search as the product does: the planner uniform networks, its opening, then over ever better tables."""
    if sampler != PLANNER:
        handle.study.sampler = make_sampler(sampler.removesuffix(PLAIN), limits.seed, 0)
        run_search(handle, searched, limits)
        return
    handle.study.sampler = make_sampler("random", limits.seed, 0)
    run_search(handle, searched, replace(limits, enqueued_only=True))
    enqueue(handle.study, problem.tables().opening)
    until = (drafted_trials(problem.space), limits.budget)
    for (make, _), trials in zip(problem.tables().parts, until, strict=True):
        tables = make(tried_configs(handle.study))
        handle.study.sampler = PlannerSampler(problem.space, tables, derived_seed(limits.seed, 0))
        run_search(handle, searched, replace(limits, budget=min(limits.budget, trials)))


def anchored(sampler: str) -> bool:
    """Whether a sampler is given starting points, as `search` does."""
    return sampler != PLANNER and not sampler.endswith(PLAIN)


def _run(problem: Problem, sampler: str, seed: int, trials: int) -> Run:
    handle = made_study(problem, sampler)
    opening = len(problem.tables().first + problem.tables().opening) if sampler == PLANNER else 0
    run, spent, last = Run(sampler, seed, [], [], opening), 0.0, cpu_seconds()

    def evaluate(config: QuantConfig) -> Measurement:
        nonlocal spent, last
        spent += cpu_seconds() - last
        found, again_s = _timed_again(problem, problem.measured.evaluate(config), run.digests)
        spent += found.cpu_s + again_s
        run.digests.append(config.content_hash())
        run.seconds.append(spent)
        last = cpu_seconds()
        return found.measurement

    searched = SearchProblem(problem.space, evaluate, anchored=anchored(sampler))
    search(problem, handle, searched, sampler, Limits(trials, seed=seed))
    return run


def _timed_again(problem: Problem, found: Measured, before: Sequence[str]) -> tuple[Measured, float]:
    """As a search does, time what reaches the front of the trials before it again; and the processor seconds of that."""
    measured, digest = problem.measured, found.config.content_hash()
    others = np.array([measured.known[one].objectives for one in before]).reshape(-1, 3)
    if (others <= found.objectives).all(axis=1).any():
        return found, 0.0
    while measured.timings(digest) <= AGAIN:
        measured.time_again(found.config)
    return measured.known[digest], measured.again_s(digest, AGAIN)


def _version(sampler: str) -> str:
    """Of the sources that decide what a sampler proposes, and of kernel times: a run with others is not this sampler's."""
    if sampler == PLANNER:
        return f"{source_digest('*.py', 'tables/*.py')}-{METHOD}"
    return f"{source_digest('samplers.py', 'proposals.py', 'anchors.py')}-{optuna.__version__}"


def measure_all(problem: Problem) -> None:
    """Measure every configuration of a space, in random order."""
    left: dict[str, QuantConfig] = {}
    for values in problem.space.all_values():
        config = problem.space.config(values)
        left.setdefault(config.content_hash(), config)
    order = np.random.default_rng(time.time_ns()).permutation(len(left))
    configs = list(left.values())
    _measure_each(problem, (configs[index] for index in order), len(left))


def fill(problem: Problem, count: int) -> None:
    """Measure random mixtures and neighbours of the front in turn until so many configurations are known."""
    rng, known = np.random.default_rng(time.time_ns()), problem.measured.known

    def proposals() -> Iterator[QuantConfig]:
        while len(known) < count:
            near = _random_values(problem.space, rng)
            if known and rng.random() < 0.5:
                near = _values_of(problem.space, known[rng.choice(front_of(problem, known))].config)
            values = unseen_values(problem.space, near, known, rng)
            if values is None:
                return
            yield problem.space.config(values)

    _measure_each(problem, proposals(), count)


def settle(problem: Problem, at_least: int = 1) -> None:
    """Time again what is on the front or nearly so, on a run's own front, or was noisy, until all of that has TIMINGS timings.

    What a process times is off by up to two percent as a whole, by the state of the machine: a run's front, which one process
    timed three times, is therefore timed again as often as the front that it is compared with.

    Args:
        problem: What is measured.
        at_least: Timings that everything else shall have.
    """
    measured = problem.measured
    while True:
        measured.refresh()
        noisy = [digest for digest, one in measured.known.items() if one.measurement.latency.noisy]
        wanted = dict.fromkeys([*_near_front(problem), *_fronts_of_runs(problem), *noisy])
        left = [digest for digest in wanted if measured.timings(digest) < TIMINGS]
        left = left or [digest for digest in measured.known if measured.timings(digest) < at_least]
        if not left:
            return
        print(f"timing {len(left)} configurations again", file=sys.stderr, flush=True)
        for digest in left:
            measured.time_again(measured.known[digest].config)


def _near_front(problem: Problem) -> list[str]:
    """The known configurations that would be on the front if their timings were as unlucky as they may be."""
    known = problem.measured.known
    front = np.array([known[digest].objectives for digest in front_of(problem, known)])

    def behind(digest: str) -> bool:
        slack = (1.0 - NEAR / problem.measured.timings(digest) ** 0.5, 1.0, 1.0)
        return bool((front < np.array(known[digest].objectives) * slack).all(axis=1).any())

    return [digest for digest in known if not behind(digest)]


def _fronts_of_runs(problem: Problem) -> list[str]:
    """What is on the front of a kept run of these sources."""
    found: list[str] = []
    for sampler in (PLANNER, *SAMPLERS, *(name + PLAIN for name in SAMPLERS)):
        for path in (problem.folder / "runs").glob(f"{sampler}-{_version(sampler)}-{AGAIN}-*.json"):
            digests = json.loads(path.read_text(encoding="utf-8"))["digests"]
            # Another process may have measured what this one has not read yet.
            found += front_of(problem, [digest for digest in digests if digest in problem.measured.known])
    return found


def front_of(problem: Problem, digests: Iterable[str]) -> list[str]:
    """Those of known configurations that no other one of them dominates."""
    among = list(digests)
    points = np.array([problem.measured.known[digest].objectives for digest in among]).reshape(-1, 3)
    return [digest for digest, keep in zip(among, moocore.is_nondominated(points), strict=True) if keep] if among else []


def _measure_each(problem: Problem, configs: Iterable[QuantConfig], count: int) -> None:
    start, done = time.monotonic(), 0
    for config in configs:
        if config.content_hash() in problem.measured.known:
            continue
        try:
            problem.measured.evaluate(config)
        except TrialError as error:
            print(f"failed: {error}", file=sys.stderr, flush=True)
            continue
        done += 1
        if done % REFRESH == 0:
            problem.measured.refresh()
            each = (time.monotonic() - start) / done
            print(f"{len(problem.measured.known)} of {count} known, {each:.2f} s each", file=sys.stderr, flush=True)


def _random_values(space: BoundSpace, rng: np.random.Generator) -> dict[str, Any]:
    """Parameter values; shares of the precisions are drawn first, or else all mixtures would be alike."""
    shares = {layer.values: rng.dirichlet(np.ones(len(layer.values))) for layer in space.layers}
    values: dict[str, Any] = {one.name: one.values[rng.integers(len(one.values))] for one in space.settings}
    return values | {layer.name: layer.values[rng.choice(len(layer.values), p=shares[layer.values])] for layer in space.layers}


def _values_of(space: BoundSpace, config: QuantConfig) -> dict[str, Any]:
    """Parameter values that mean a configuration."""
    settings = {
        CALIBRATION: config.calibration.mode,
        PERCENTILE_TAIL: round(100.0 - config.calibration.percentile, 9),
        GRANULARITY: config.granularity,
        WEIGHT_SCALE: config.weight_scale,
    }
    # The others are named as in the configuration.
    found = {one.name: settings.get(one.name, getattr(config, one.name, None)) for one in space.settings}
    return found | {one.name: config.precision[one.name] for one in space.layers}
