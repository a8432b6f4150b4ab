"""One run of `search`: get ready, run trials, measure the front again, report.

Imports everything heavy; who asks imports this file once the request is known to be good.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from qsearch.config import named_config
from qsearch.errors import TrialError
from qsearch.report.documents import baseline_of, record_bound, record_run, study_document
from qsearch.report.tables import NOTHING_BEATS_FLOAT, front_words, study_table
from qsearch.search.bound import tables_bound
from qsearch.search.bound_space import bind_space
from qsearch.search.constraints import limits_text
from qsearch.search.evaluation.evaluator import Evaluator, Progress
from qsearch.search.evaluation.objective import open_evaluator
from qsearch.search.front import record_heldout, study_front
from qsearch.search.locks import lane_file
from qsearch.search.planner import PlannerSampler
from qsearch.search.profile import Profile
from qsearch.search.provenance import layer_facts, machine_facts, package_versions
from qsearch.search.samplers import PLANNER
from qsearch.search.study import DEVICE, OBJECTIVE_VERSION, Identity, StudyHandle, study_to_search
from qsearch.session.local_workers import local_workers
from qsearch.session.planned_trials import begin_opening
from qsearch.session.search_finetune import finetune_front, wished_images
from qsearch.session.search_request import SearchRequest
from qsearch.session.search_trials import run_trials
from qsearch.session.trial_log import TrialLog

__all__ = ["for_task", "identity_of", "run_session"]

NOISE_AGAIN = (
    "{noisy} of these {front} points could not be timed well: beside float, their times spread too far even when timed for "
    "longer, and they carry noisy_timing. End what else is running, or pin the search to an idle core (taskset -c N), and run "
    "the same command again: it measures the front once more"
)


def run_session(request: SearchRequest, say: Progress, console: Console) -> tuple[dict[str, Any], Table]:
    """Search until the budget is met.

    Args:
        request: What is wanted, see `checked_request`.
        say: Called with what a person at the terminal wants to know.
        console: Where a progress bar is drawn, if it can be drawn there.

    Returns:
        The JSON document and the table of the study as it stands at the end.

    Raises:
        SearchInterrupted: The user interrupted the search.
        QSearchError: The request cannot be carried out.
    """
    start = time.monotonic()
    if request.dask is not None:
        from qsearch.search.evaluation.dask_crew import require_cluster

        require_cluster(request.dask)
    evaluator = open_evaluator(request.settings, say, {request.space.name: request.space})
    request = for_task(request, evaluator.profile, say)
    seed = request.settings.seed
    images = wished_images(evaluator, request.finetune, seed, say)
    bound = bind_space(request.space, evaluator.graph, evaluator.idle_methods)
    with TrialLog(request.log) as log, _study(request, evaluator) as handle:
        log.tell("begin", study=handle.name, storage=handle.shown_url, model=request.settings.model, budget=request.budget)
        record_run(handle, evaluator.baseline, _facts(request, evaluator, start))
        # A study has one float module to compare with, that of its first run.
        baseline = baseline_of(handle) or evaluator.baseline
        evaluator.refer_to(baseline)
        # One of the jobs is the measuring process; devices of a tracker are measured on by every process itself.
        more = max(0, (request.jobs or 0) - (2 if request.settings.rpc is None else 1))
        evaluator.keep_to(lane_file(handle.name, handle.url), crowded=more > 0)
        if request.sampler == PLANNER:
            begin_opening(handle, bound)
        with local_workers(handle, more, request.command, say):
            run_trials(handle, request, bound, evaluator, (say, console, log))
        _record_bound(handle, request)
        _verify(handle, evaluator, say)
        if images is not None:
            finetune_front(handle, evaluator, images, request.finetune.count, seed, say)
        record_run(handle, baseline, _facts(request, evaluator, start))
        document = study_document(handle)
        log.tell(
            "end", trials=document["trials"], front=[point["trial"] for point in document["front"]], seconds=document["seconds"]
        )
        if document["beats_float"] is False:
            say(NOTHING_BEATS_FLOAT)
        if document["front"]:
            say(front_words(document))
        return document, study_table(handle, baseline)


def _study(request: SearchRequest, evaluator: Evaluator) -> AbstractContextManager[StudyHandle]:
    watch = request.watch
    return study_to_search(request.study, identity_of(request, evaluator), request.storage, watch.reason, watch.process)


def for_task(request: SearchRequest, profile: Profile, say: Progress) -> SearchRequest:
    """The request with the defaults of what the model is for."""
    stopping = request.early_stopping and profile.task == "classification"
    if stopping != request.early_stopping:
        say("no trial is stopped early: mAP is no mean over images, so that some of them say nothing certain of all")
    return replace(request, space=profile.space(request.space), early_stopping=stopping)


def identity_of(request: SearchRequest, evaluator: Evaluator) -> Identity:
    """What must stay the same for all that is measured of a study."""
    settings = request.settings
    parts = {**evaluator.identity, "space": request.space.content_hash(), "objective": OBJECTIVE_VERSION}
    if "device" not in parts:
        parts[DEVICE] = evaluator.device_kind
    parts["kernels"] = _kernels(evaluator, request.space.precisions.names)
    # Seed and preprocessing belong to the data: they decide which images are in which part, and what becomes of them.
    data = [str(settings.data or "the model's own"), f"seed {settings.seed}"]
    data += [f"preprocessing {settings.preprocessing}"] if settings.preprocessing else []
    if request.limits:
        # Left out where there are none, as studies made before there were constraints have it.
        parts["constraints"] = limits_text(request.limits, evaluator.baseline.accuracy.metric)
    labels = {"model": settings.model, "data": ", ".join(data), "space": request.space.name}
    return Identity(parts, labels)


def _kernels(evaluator: Evaluator, precisions: Sequence[str]) -> str:
    """Digest of the model's kernels in every precision that the space knows: trials of one study are built from the same.

    The mixtures between them add conversions and other epilogues, but no other tiles.
    """
    found = []
    for name in precisions:
        try:
            found.append(evaluator.kernels_sha256(named_config(name)))
        except TrialError:
            # That fails trials, not the study.
            found.append("none")
    return hashlib.sha256(" ".join(found).encode()).hexdigest()


def _facts(request: SearchRequest, evaluator: Evaluator, start: float) -> dict[str, Any]:
    seconds = {**evaluator.seconds, "total": time.monotonic() - start}
    settings = request.settings
    facts: dict[str, Any] = {
        "model": settings.model,
        "target": settings.target,
        "settings": settings.to_json(),
        "seconds": seconds,
    }
    facts |= {"limits": dict(request.limits), "sampler": request.sampler, "budget": request.budget}
    # What a worker that joins the study needs to know.
    facts |= {"space": request.space.model_dump(mode="json"), "early_stopping": request.early_stopping}
    # What a report says of where the figures are from, when the model is no longer at hand.
    return facts | {"layers": layer_facts(evaluator.graph), "machine": machine_facts(), "versions": package_versions()}


def _record_bound(handle: StudyHandle, request: SearchRequest) -> None:
    """Say in the study how far its front could go by the planner's tables; nothing where another sampler searched."""
    sampler = handle.study.sampler
    if not isinstance(sampler, PlannerSampler) or not sampler.space.parameters:
        return
    with handle.guard():
        observations = sampler.observations(handle.study)
    record_bound(handle, tables_bound(sampler.space, sampler.tables, observations, request.limits))


def _verify(handle: StudyHandle, evaluator: Evaluator, say: Progress) -> None:
    """Measure the front again, unless all of it was already, and without noise."""
    with handle.guard():
        front = study_front(handle.study)
    if all(point.heldout is not None and not point.heldout.latency.noisy for point in front):
        return
    say(f"measuring the {len(front)} points of the front again, in a fresh process and on held-out images")
    verdicts = evaluator.verify_front([point.config for point in front])
    with handle.guard():
        record_heldout(handle.study, front, verdicts)
    if noisy := sum(latency.noisy for latency, _ in verdicts):
        say(NOISE_AGAIN.format(noisy=noisy, front=len(front)))
