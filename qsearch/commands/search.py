"""`search`: from a model to a Pareto front of measured configurations."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from qsearch.commands.options import (
    Batch,
    ConvertChannels,
    CostTable,
    Data,
    Jobs,
    Json,
    LogJson,
    MaxMemory,
    Model,
    Preprocessing,
    Restarts,
    Rpc,
    RpcKey,
    Seed,
    Storage,
    Target,
    Task,
    Threads,
    TrialTimeout,
    Weights,
    checked_task,
)
from qsearch.commands.terminal import (
    INFEASIBLE,
    INTERRUPTED,
    is_own_process,
    print_json,
    print_table,
    say,
    stderr_console,
    stdout_reserved,
)

__all__ = ["search"]


def search(
    context: typer.Context,
    model: Model = "demo",
    weights: Weights = None,
    data: Data = None,
    target: Target = "llvm",
    threads: Threads = 1,
    batch: Batch = 1,
    space: Annotated[str, typer.Option(help="Search space: a YAML file or the name of a preset.")] = "default",
    budget: Annotated[int, typer.Option(min=1, help="Measured trials that the study shall have in total.")] = 200,
    timeout: Annotated[float | None, typer.Option(min=0.0, help="Begin no trial after this many seconds of trials.")] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study.", show_default="from the model")] = None,
    storage: Storage = None,
    sampler: Annotated[str, typer.Option(help="planner (with measured tables), random, tpe, nsgaii, nsgaiii, gp.")] = "planner",
    seed: Seed = 0,
    tune: Annotated[float, typer.Option(min=0.0, help="Before a new study, time register tiles for so many seconds.")] = 0.0,
    max_latency_ms: Annotated[float | None, typer.Option(help="Constraint: largest latency wanted, milliseconds.")] = None,
    max_bytes: Annotated[float | None, typer.Option(help="Constraint: most memory wanted, bytes.")] = None,
    max_loss_pp: Annotated[
        float | None, typer.Option(help="Constraint: most top-1, or a detector's mAP, lost, percentage points.")
    ] = None,
    early_stopping: Annotated[
        bool, typer.Option(help="End a trial as soon as its first images show that it can reach neither front nor constraints.")
    ] = True,
    jobs: Jobs = None,
    dask: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler, such as tcp://HOST:8786, whose workers build and measure.")
    ] = None,
    then_finetune: Annotated[
        int, typer.Option(min=0, help="At the end, fine-tune so many points of the front, those that lose most; see `finetune`.")
    ] = 0,
    train: Annotated[
        Path | None,
        typer.Option(help="With --then-finetune: labelled images to train on.", show_default="what demo was trained on"),
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=10, help="With --then-finetune: training images to use at most.", show_default="all")
    ] = None,
    preprocessing: Preprocessing = None,
    task: Task = None,
    convert_channels: ConvertChannels = False,
    cost_table: CostTable = None,
    rpc: Rpc = None,
    rpc_key: RpcKey = None,
    restarts: Restarts = 3,
    trial_timeout: TrialTimeout = None,
    max_memory_gb: MaxMemory = None,
    log_json: LogJson = None,
    json: Json = False,
) -> None:
    """Search per-layer precisions; the same command again continues its study.

    A study keeps its constraints: others are refused and need another --study name. If no configuration is within them
    at the end, the closest ones are printed and the exit status is 3. Trials stopped early count against the budget.
    """
    from qsearch.errors import UsageError
    from qsearch.search.constraints import checked_limits
    from qsearch.search.evaluation.evaluator import Settings
    from qsearch.search.space import load_space
    from qsearch.session.search_request import FinetuneWish, SearchRequest, checked_request, default_study
    from qsearch.session.supervisor import process_limits, supervised

    settings = Settings(
        *(model, weights, data, target, convert_channels, preprocessing, seed),
        threads=threads,
        batch=batch,
        task=checked_task(task),
        cost_table=cost_table,
        rpc=rpc,
        rpc_key=rpc_key,
    )
    if not then_finetune and (train or images):
        raise UsageError("--train and --images are what --then-finetune trains on: give it a number, or leave them out")
    limits = checked_limits(max_latency_ms, max_bytes, max_loss_pp)
    name = study or default_study(model)
    asked = (settings, load_space(space), name, storage, sampler, budget, timeout, limits, early_stopping, jobs)
    tuned = FinetuneWish(then_finetune, train, images)
    request = checked_request(SearchRequest(*asked, finetune=tuned, log=log_json, dask=dask))
    watched = process_limits(restarts, trial_timeout, max_memory_gb)
    if tune and (cost_table or rpc):
        raise UsageError("--tune times tiles on this machine, and the search is for another: leave it out")

    if restarts and is_own_process(context):
        request = replace(request, watch=supervised(watched, say))
    if is_own_process(context):
        request = replace(request, command=(sys.executable, sys.argv[0]))

    from qsearch.commands.tune import tune_model
    from qsearch.search.study import study_has_begun
    from qsearch.session.search_session import run_session
    from qsearch.session.search_trials import SearchInterrupted

    with stdout_reserved():
        if tune and study_has_begun(name, storage):
            # What a first run had no time to tune stays as its trials were measured.
            say(f"study {name} has begun: it keeps its kernels, nothing is tuned")
        elif tune:
            tune_model(request.settings, request.space.precisions.names, tune)
        try:
            document, table = run_session(request, say, stderr_console())
        except SearchInterrupted:
            raise typer.Exit(INTERRUPTED) from None
    if json:
        print_json(document)
    else:
        print_table(table)
    if document["closest"]:
        raise typer.Exit(INFEASIBLE)
