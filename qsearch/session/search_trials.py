"""The trials of one run of `search`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from qsearch.measure.measurement import Measurement
from qsearch.report.documents import baseline_of
from qsearch.report.notes import TrialNotes
from qsearch.search.bound_space import BoundSpace
from qsearch.search.constraints import Constraints
from qsearch.search.evaluation.evaluator import Evaluator, Progress
from qsearch.search.locks import lane_file
from qsearch.search.loop.driver import Limits, SearchProblem, run_search
from qsearch.search.loop.pipeline import Pipeline
from qsearch.search.loop.problem import Crew, Outcome
from qsearch.search.loop.processors import default_jobs
from qsearch.search.samplers import PLANNER, make_sampler
from qsearch.search.study import StudyHandle
from qsearch.search.study_trials import finished, measured_trials
from qsearch.session.planned_trials import PlannedTrials, Step, drawn
from qsearch.session.search_request import SearchRequest
from qsearch.session.trial_log import TrialLog
from qsearch.session.trial_progress import TrialProgress

__all__ = ["SearchInterrupted", "run_trials"]


class SearchInterrupted(KeyboardInterrupt):
    """The user interrupted a search; that its study is intact was said."""


def run_trials(
    handle: StudyHandle,
    request: SearchRequest,
    bound: BoundSpace,
    evaluator: Evaluator,
    told: tuple[Progress, Console, TrialLog],
) -> None:
    """Run trials of an open study until its budget is met.

    Args:
        handle: The study.
        request: What is wanted.
        bound: Its space, over the model's layers.
        evaluator: Measures, and counts against the study's float module.
        told: What a person is told, the terminal, and the log.

    Raises:
        SearchInterrupted: The user interrupted the search.
        StudyError: The study cannot be written, or trial after trial failed.
    """
    say, console, log = told
    with handle.guard():
        done, trials = len(measured_trials(handle.study)), len(handle.study.get_trials(deepcopy=False))
        begun = trials > len(finished(handle.study, TrialState.WAITING))
    if begun:
        say(f"continuing study {handle.name} with {done} measured trials")
    baseline = baseline_of(handle) or evaluator.baseline
    constraints = Constraints.against(baseline, request.limits)
    notes, left_s = TrialNotes(handle, evaluator.graph, baseline), request.timeout_s
    problem = SearchProblem(
        bound,
        evaluator.evaluate,
        notes,
        constraints,
        request.early_stopping,
        confirmed=True,
        anchored=request.sampler != PLANNER and not request.joins,
        beat=request.watch.beat,
        rest=request.watch.rest,
        device=evaluator.device_kind,
    )
    with (
        _pipeline(request, evaluator, done) as pipeline,
        _crew(request, evaluator, handle, say) as crew,
        TrialProgress((done, request.budget), baseline, say, console) as progress,
    ):

        def on_trial(trial: FrozenTrial) -> None:
            # Others may have measured some of them.
            progress.on_trial(trial, len(measured_trials(handle.study)))
            log.on_trial(trial)

        problem = replace(problem, pipeline=pipeline, crew=crew)

        def run(budget: int, enqueued_only: bool = False) -> Outcome:
            nonlocal left_s
            begin = time.monotonic()
            outcome = run_search(handle, problem, Limits(budget, left_s, request.settings.seed, enqueued_only), on_trial)
            # Of trials alone: tables take as long as they do.
            left_s = None if left_s is None else max(0.0, left_s - (time.monotonic() - begin))
            return outcome

        outcome = Outcome("enqueued", 0)
        try:
            for step in _steps(handle, request, bound, evaluator, baseline, trials):
                if outcome.stopped not in ("enqueued", "budget"):
                    break
                # No trial is under way: what these are drawn with may take longer than any of them.
                request.watch.rest()
                if pipeline is not None:
                    # The measuring process would disturb the kernels that are timed.
                    pipeline.settle()
                with progress.aside():
                    step.prepare()
                outcome = run(step.budget, step.enqueued_only)
        except KeyboardInterrupt:
            # In the tables: of a trial it is an outcome.
            outcome = Outcome("interrupted", 0)
    request.watch.rest()
    with handle.guard():
        done = len(measured_trials(handle.study))
    _say_end(outcome, done, handle, request, say)


def _steps(
    handle: StudyHandle, request: SearchRequest, bound: BoundSpace, evaluator: Evaluator, baseline: Measurement, trials: int
) -> Iterable[Step]:
    """The trials of a study that had so many."""
    if request.sampler == PLANNER:
        return PlannedTrials(handle, request, bound, evaluator, baseline, trials).steps()

    def sample() -> None:
        handle.study.sampler = make_sampler(request.sampler, request.settings.seed, *drawn(request, trials))

    return [Step(sample, request.budget)]


def _say_end(outcome: Outcome, done: int, handle: StudyHandle, request: SearchRequest, say: Progress) -> None:
    """Say how trials ended, where it was not their budget that ended them.

    Raises:
        SearchInterrupted: The user did.
    """
    if outcome.stopped == "interrupted":
        say(f"interrupted; study {handle.name} is intact with {done} measured trials, the same command continues it")
        raise SearchInterrupted
    if outcome.stopped == "timeout":
        say(f"time is up after {done} of {request.budget} trials; the same command continues the study")
    if outcome.stopped == "exhausted":
        say(f"the search space holds no configuration that was not tried: stopping at {done} of {request.budget} trials")


def _pipeline(request: SearchRequest, evaluator: Evaluator, done: int) -> AbstractContextManager[Pipeline | None]:
    """The measuring process, for as many jobs as there are to be; none where nothing is left to measure."""
    if done >= request.budget or request.dask is not None:
        return nullcontext()
    return evaluator.pipeline(min(request.jobs or 2, default_jobs(request.settings.threads)))


def _crew(
    request: SearchRequest, evaluator: Evaluator, handle: StudyHandle, say: Progress
) -> AbstractContextManager[Crew | None]:
    """The workers of a Dask cluster, where they are to do it."""
    if request.dask is None:
        return nullcontext()
    from qsearch.search.evaluation.dask_crew import dask_crew

    return dask_crew(request.dask, evaluator, request.settings, lane_file(handle.name, handle.url), say)
