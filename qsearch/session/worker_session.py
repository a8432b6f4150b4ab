"""One run of `worker`: work on a study that a search has begun, here or on another machine, until its budget is met."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from qsearch.errors import StudyError
from qsearch.report.documents import baseline_of, run_of, settings_of
from qsearch.search.bound_space import bind_space
from qsearch.search.evaluation.evaluator import CACHE, Progress, Settings
from qsearch.search.evaluation.named_target import named_target
from qsearch.search.locks import lane_file
from qsearch.search.loop.processors import check_jobs
from qsearch.search.space import SearchSpace
from qsearch.search.study import StudyHandle, load_study, study_to_join
from qsearch.search.study_trials import measured_trials
from qsearch.session.search_request import SearchRequest
from qsearch.session.supervisor import Watch
from qsearch.session.trial_log import TrialLog

__all__ = ["WorkerRequest", "join_session"]


@dataclass(frozen=True)
class WorkerRequest:
    """What the user asked for.

    Attributes:
        study: Name of the study.
        storage: SQLAlchemy URL; None for the default.
        places: Where model, weights, data or preprocessing of the study lie on this machine, by their names in `Settings`.
        jobs: As of a search.
        log: As of a search.
        watch: The process that watches this one.
    """

    study: str
    storage: str | None = None
    places: Mapping[str, Any] = field(default_factory=dict)
    jobs: int | None = None
    log: Path | None = None
    watch: Watch = field(default_factory=Watch)


def join_session(request: WorkerRequest, say: Progress, console: Console) -> dict[str, Any]:
    """Run trials of a study beside others until its budget is met.

    Args:
        request: What is wanted.
        say: Called with what a person at the terminal wants to know.
        console: Where a progress bar is drawn, if it can be drawn there.

    Returns:
        study, storage, and how many trials are measured of its budget.

    Raises:
        SearchInterrupted: The user interrupted it.
        QSearchError: There is no such study, or this machine cannot work on it.
    """
    from qsearch.search.evaluation.objective import prepare_evaluator
    from qsearch.session.search_session import identity_of
    from qsearch.session.search_trials import run_trials

    begun = load_study(request.study, request.storage)
    with begun.guard():
        search, baseline = _search_of(begun, request), baseline_of(begun)
    if baseline is None:
        raise _not_begun(request.study)
    evaluator = prepare_evaluator(search.settings, say, {search.space.name: search.space})
    # Float is timed once, by the search: here it is what modules are timed in turns with.
    evaluator.refer_to(baseline)
    bound = bind_space(search.space, evaluator.graph, evaluator.idle_methods)
    with (
        TrialLog(search.log) as log,
        study_to_join(search.study, identity_of(search, evaluator), search.storage) as handle,
    ):
        evaluator.keep_to(lane_file(handle.name, handle.url), crowded=True)
        log.tell("join", study=handle.name, storage=handle.shown_url, model=search.settings.model, budget=search.budget)
        run_trials(handle, search, bound, evaluator, (say, console, log))
        with handle.guard():
            done = len(measured_trials(handle.study))
        return {"study": handle.name, "storage": handle.shown_url, "measured": done, "budget": search.budget}


def _search_of(handle: StudyHandle, request: WorkerRequest) -> SearchRequest:
    """What the search that has begun a study was asked for, as it is to be done here."""
    run = run_of(handle)
    if "space" not in run:
        raise _not_begun(handle.name)
    try:
        space = SearchSpace.model_validate(run["space"])
    except ValidationError as error:
        raise StudyError(f"study {handle.name!r} was begun by another version of qsearch: its space is not understood") from error
    # The search's own cache may lie on another machine.
    settings: Settings = replace(settings_of(handle), cache_dir=CACHE, **request.places)
    if settings.rpc is None:
        check_jobs(request.jobs, settings.threads)
    return SearchRequest(
        named_target(settings),
        space,
        handle.name,
        request.storage,
        run["sampler"],
        run["budget"],
        limits=run["limits"],
        early_stopping=run["early_stopping"],
        jobs=request.jobs,
        log=request.log,
        watch=request.watch,
        joins=True,
    )


def _not_begun(study: str) -> StudyError:
    return StudyError(
        f"study {study!r} has no float module to compare with yet: run its search first, then join it with `worker`"
    )
