"""The trials of one run of `search`: of a planned one its opening, then those planned over ever better tables."""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from qsearch.measure.measurement import Measurement
from qsearch.report.documents import baseline_of
from qsearch.report.notes import TrialNotes
from qsearch.report.table_notes import attach_tables
from qsearch.search.anchors import enqueue
from qsearch.search.bound_space import BoundSpace
from qsearch.search.constraints import Constraints
from qsearch.search.evaluation.evaluator import Evaluator, Progress
from qsearch.search.locks import lane_file
from qsearch.search.loop.driver import Limits, SearchProblem, run_search
from qsearch.search.loop.pipeline import Pipeline
from qsearch.search.loop.problem import Crew, Outcome
from qsearch.search.loop.processors import default_jobs
from qsearch.search.members import this_member
from qsearch.search.opening import choose_opening, opening_setting, uniform_anchors
from qsearch.search.planner import PlannerSampler, drafted_trials
from qsearch.search.samplers import PLANNER, derived_seed, make_sampler
from qsearch.search.study import StudyHandle
from qsearch.search.study_trials import finished, measured_trials
from qsearch.search.tables.layer_tables import Draft, Tables, layer_rows
from qsearch.session.search_request import SearchRequest
from qsearch.session.trial_log import TrialLog
from qsearch.session.trial_progress import TrialProgress

__all__ = ["SearchInterrupted", "begin_opening", "run_trials"]

# Whether a study's opening has been chosen, and the value that says that it has not.
_OPENING, _DUE = "opening", "due"


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
    planned = request.sampler == PLANNER
    notes, left_s = TrialNotes(handle, evaluator.graph, baseline), request.timeout_s
    problem = SearchProblem(
        bound,
        evaluator.evaluate,
        notes,
        constraints,
        request.early_stopping,
        confirmed=True,
        anchored=not planned and not request.joins,
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

        def between(step: Callable[[], None]) -> None:
            # No trial is under way: this may take longer than any of them.
            request.watch.rest()
            if pipeline is not None:
                # The measuring process would disturb the kernels that are timed.
                pipeline.settle()
            with progress.aside():
                step()

        try:
            if planned:
                # Tables take minutes: what does without them comes first.
                handle.study.sampler = make_sampler("random", request.settings.seed, trials)
                draft = cache(lambda: evaluator.draft(bound, opening_setting(bound)))
                outcome = run(request.budget, enqueued_only=True)
                if outcome.stopped == "enqueued" and not request.joins and _is_due(handle):
                    between(partial(_enqueue_opening, handle, bound, baseline, draft, constraints))
                    outcome = run(request.budget, enqueued_only=True)
                for tables, budget in _parts(handle, request, bound, evaluator, draft):
                    if outcome.stopped not in ("enqueued", "budget"):
                        break
                    between(partial(_plan, handle, request, bound, tables, constraints, trials))
                    outcome = run(budget)
            else:
                handle.study.sampler = make_sampler(request.sampler, request.settings.seed, *_drawn(request, trials))
                outcome = run(request.budget)
        except KeyboardInterrupt:
            # In the tables: of a trial it is an outcome.
            outcome = Outcome("interrupted", 0)
    request.watch.rest()
    with handle.guard():
        done = len(measured_trials(handle.study))
    _say_end(outcome, done, handle, request, say)


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


def begin_opening(handle: StudyHandle, bound: BoundSpace) -> None:
    """Enqueue what a planned study begins with before any kernel is timed, unless it has begun."""
    with handle.guard():
        if handle.study.get_trials(deepcopy=False):
            return
        handle.study.set_user_attr(_OPENING, _DUE)
        enqueue(handle.study, uniform_anchors(bound))


def _is_due(handle: StudyHandle) -> bool:
    with handle.guard():
        return bool(handle.study.user_attrs.get(_OPENING) == _DUE)


def _enqueue_opening(
    handle: StudyHandle, bound: BoundSpace, baseline: Measurement, draft: Callable[[], Draft], constraints: Constraints
) -> None:
    """Enqueue what a planned study goes on with."""
    anchors = choose_opening(bound, draft().cost, baseline, constraints)
    with handle.guard():
        enqueue(handle.study, anchors)
        handle.study.set_user_attr(_OPENING, "chosen")


def _parts(
    handle: StudyHandle, request: SearchRequest, bound: BoundSpace, evaluator: Evaluator, draft: Callable[[], Draft]
) -> Iterator[tuple[Callable[[], Tables], int]]:
    """What is planned over after the opening, one after the other: what makes the tables, and how many trials there are then."""
    with handle.guard():
        done = len(measured_trials(handle.study))
    most = max(done, request.budget)
    # To time what neighbours cost takes as long as many trials, and finds a front no sooner; unless times are given.
    mixed = request.settings.cost_table is not None
    parts: list[tuple[Callable[[], Tables], float]] = [
        (lambda: draft().tables(), drafted_trials(bound)),
        (lambda: evaluator.tables(bound, mixed), math.inf),
    ]
    for tables, trials in parts:
        enough = most <= trials
        if done < trials or enough:
            yield tables, int(min(request.budget, trials))
            done = int(min(most, trials))
        if enough:
            return


def _plan(
    handle: StudyHandle,
    request: SearchRequest,
    bound: BoundSpace,
    tables: Callable[[], Tables],
    constraints: Constraints,
    trials: int,
) -> None:
    """Have a study, which had so many trials, planned over the tables that are made here from now on."""
    made, seed = tables(), derived_seed(request.settings.seed, *_drawn(request, trials))
    handle.study.sampler = PlannerSampler(bound, made, seed, constraints)
    if not request.joins:
        attach_tables(handle, layer_rows(bound, made))


def _drawn(request: SearchRequest, trials: int) -> tuple[int, ...]:
    """What a seed is of: processes that begin at the same time must not draw the same."""
    return (trials, zlib.crc32(json.dumps(this_member()).encode())) if request.joins else (trials,)


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
