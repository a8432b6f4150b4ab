"""What a search is asked for, and what can be said of it before minutes are spent on the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from qsearch.errors import UsageError
from qsearch.search.evaluation.evaluator import Settings
from qsearch.search.evaluation.named_target import named_target
from qsearch.search.loop.processors import check_jobs
from qsearch.search.samplers import PLANNER, check_sampler
from qsearch.search.space import SearchSpace
from qsearch.search.storage import checked_name, database_file, storage_url
from qsearch.session.local_workers import COMMAND_LINE
from qsearch.session.supervisor import Watch

__all__ = ["FinetuneWish", "SearchRequest", "checked_request", "default_study"]


@dataclass(frozen=True)
class FinetuneWish:
    """What a search shall fine-tune at its end.

    Attributes:
        count: How many points of the front at most.
        train: Directory of labelled images; None for what the built-in model was trained on.
        images: Training images to use at most; None for all.
    """

    count: int = 0
    train: Path | None = None
    images: int | None = None


@dataclass(frozen=True)
class SearchRequest:
    """What the user asked for.

    Attributes:
        settings: Model, data, target.
        space: What may be tried.
        study: Name of the study.
        storage: SQLAlchemy URL; None for the default.
        sampler: Its name.
        budget: Measured trials the study shall have in total.
        timeout_s: No trial is begun after that many seconds of trials.
        limits: Objective -> largest value wanted.
        early_stopping: Whether trials end as soon as their outcome is certain.
        jobs: 2 to build a trial while the one before is measured, more for as many workers besides; None for 2 where there are
            processors for it.
        finetune: What to fine-tune at the end.
        log: File to append a line of JSON to for every trial.
        watch: The process that watches this one.
        joins: Whether it works on a study beside the search that has begun it.
        dask: Address of a Dask scheduler whose workers build and measure; None for this machine.
        command: How workers are started: the words before `worker`.
    """

    settings: Settings
    space: SearchSpace
    study: str
    storage: str | None = None
    sampler: str = PLANNER
    budget: int = 200
    timeout_s: float | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    early_stopping: bool = True
    jobs: int | None = None
    finetune: FinetuneWish = FinetuneWish()
    log: Path | None = None
    watch: Watch = field(default_factory=Watch)
    joins: bool = False
    dask: str | None = None
    command: tuple[str, ...] = COMMAND_LINE


def checked_request(request: SearchRequest) -> SearchRequest:
    """The request with its target named, after whatever is wrong with it was said that needs no model to be seen.

    Raises:
        UsageError: It cannot be carried out as written.
    """
    database_file(storage_url(checked_name(request.study), request.storage))
    check_sampler(request.sampler, request.settings.seed)
    if request.budget < 1:
        raise UsageError(f"the budget is a number of trials, 1 or more, got {request.budget}")
    if request.timeout_s is not None and not request.timeout_s >= 0:
        raise UsageError(f"the timeout is a number of seconds, 0 or more, got {request.timeout_s}")
    if request.settings.batch < 1:
        raise UsageError(f"the batch is a number of images, 1 or more, got {request.settings.batch}")
    if request.settings.rpc is None:
        check_jobs(request.jobs, request.settings.threads)
    if request.dask is not None and request.jobs:
        raise UsageError("--dask says how many trials are under way, by what its workers offer: leave out --jobs")
    return replace(request, settings=named_target(request.settings))


def default_study(model: str) -> str:
    """A study name for a model: 'torchvision:resnet18' -> 'torchvision-resnet18', 'nets/a.pt2' -> 'a'."""
    name = Path(model).stem if model.endswith(".pt2") else model
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:100] or "study"
