"""`worker`: work on a study beside the search that has begun it."""

from __future__ import annotations

from typing import Annotated

import typer

from qsearch.commands.options import (
    Data,
    Jobs,
    Json,
    LogJson,
    MaxMemory,
    Preprocessing,
    Restarts,
    Storage,
    Study,
    TrialTimeout,
    Weights,
)
from qsearch.commands.terminal import (
    INTERRUPTED,
    is_own_process,
    print_json,
    say,
    stderr_console,
    stdout_reserved,
)

__all__ = ["worker"]


def worker(
    context: typer.Context,
    study: Study,
    storage: Storage = None,
    model: Annotated[str | None, typer.Option(help="The study's model where it lies here.", show_default="the study's")] = None,
    weights: Weights = None,
    data: Data = None,
    preprocessing: Preprocessing = None,
    jobs: Jobs = None,
    restarts: Restarts = 3,
    trial_timeout: TrialTimeout = None,
    max_memory_gb: MaxMemory = None,
    log_json: LogJson = None,
    json: Json = False,
) -> None:
    """Work on a study beside the search that has begun it, on this machine or another, until its budget is met.

    Workers come and go as they like. Model, images, kernels and kind of processor must be those of the study. Between machines
    the study lies on a server: --storage postgresql+psycopg://USER@HOST/DATABASE.
    """
    from qsearch.session.supervisor import Watch, process_limits, supervised
    from qsearch.session.worker_session import WorkerRequest, join_session

    given = {"model": model, "weights": weights, "data": data, "preprocessing": preprocessing}
    places = {name: place for name, place in given.items() if place is not None}
    limits = process_limits(restarts, trial_timeout, max_memory_gb)
    watch = supervised(limits, say) if restarts and is_own_process(context) else Watch()

    from qsearch.session.search_trials import SearchInterrupted

    with stdout_reserved():
        try:
            document = join_session(WorkerRequest(study, storage, places, jobs, log_json, watch), say, stderr_console())
        except SearchInterrupted:
            raise typer.Exit(INTERRUPTED) from None
    if json:
        print_json(document)
    else:
        say(f"study {document['study']} has {document['measured']} of {document['budget']} measured trials")
