"""Options that several verbs have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

__all__ = [
    "Batch",
    "ConvertChannels",
    "CostTable",
    "Data",
    "Json",
    "Model",
    "Preprocessing",
    "Rpc",
    "RpcKey",
    "Seed",
    "Storage",
    "Study",
    "Target",
    "Task",
    "Threads",
    "Trust",
    "Weights",
    "checked_task",
]

Model = Annotated[
    str, typer.Option(help="demo, demo_detector, efficientnet_lite0, torchvision:NAME, package.module:factory, or a .pt2 file.")
]
Weights = Annotated[Path | None, typer.Option(help="Checkpoint to load instead of the model's own weights.")]
Data = Annotated[
    Path | None,
    typer.Option(help="Directory of images: one folder per class, labels.csv, or boxes.csv. Default: the model's own images."),
]
Target = Annotated[
    str,
    typer.Option(
        help="What to compile for: host (or llvm), portable, an LLVM name of a CPU such as icelake-server, aarch64:NAME, "
        "cuda for this machine's GPU, or cuda:ARCH such as cuda:sm_90."
    ),
]
Threads = Annotated[int, typer.Option(min=1, help="Threads that a module runs on.")]
Batch = Annotated[int, typer.Option(min=1, help="Images of one inference; latency and memory are those of so many.")]
ConvertChannels = Annotated[
    bool, typer.Option("--convert-channels", help="Convert grey images to colour, or the reverse, where the model needs it.")
]
Preprocessing = Annotated[Path | None, typer.Option(help="File that overrides the model's preprocessing.")]
Task = Annotated[
    str | None,
    typer.Option(
        help="classification or detection: what is lost, top-1 or mAP, and which layers stay precise.",
        show_default="from the model",
    ),
]
CostTable = Annotated[
    Path | None,
    typer.Option(help="Kernel times of a device that is not here, from measure-pack: latency is then modelled, not measured."),
]
Rpc = Annotated[
    str | None, typer.Option(help="HOST:PORT of a TVM RPC tracker: modules are timed on its devices under --key. Needs --target.")
]
RpcKey = Annotated[str | None, typer.Option("--key", help="Key of the devices that --rpc's tracker is asked for.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random choice.")]
Study = Annotated[str, typer.Option(help="Name of the study.")]
Storage = Annotated[
    str | None,
    typer.Option(
        help="SQLAlchemy URL of the study's database.", envvar="QSEARCH_STORAGE", show_default="sqlite:///studies/STUDY.db"
    ),
]
Trust = Annotated[bool, typer.Option("--trust", help="Run the code of what was not made by this user here.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of a table.")]


def checked_task(name: str | None) -> Any:
    """The task of that name; None for what the model says.

    Raises:
        UsageError: There is no such task.
    """
    from qsearch.errors import UsageError
    from qsearch.measure.measurement import Task as Tasks

    if name is not None and name not in get_args(Tasks):
        raise UsageError(f"unknown task {name!r}: use {' or '.join(get_args(Tasks))}, or leave it out")
    return name


Jobs = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Trials at a time: with 2, one is measured in a process of its own while the next one is built; more build besides.",
        show_default="2 where there are processors for it",
    ),
]
Restarts = Annotated[
    int,
    typer.Option(min=0, help="How often in a row the search goes on by itself after its process died; 0 to watch nothing."),
]
TrialTimeout = Annotated[
    float | None, typer.Option(min=1.0, help="Seconds within which a trial must end; one that does not is tried once more.")
]
MaxMemory = Annotated[
    float | None, typer.Option(min=0.5, help="Memory that the search may take before the trial under way is given up.")
]
LogJson = Annotated[Path | None, typer.Option(help="Append one JSON document a line to this file, for every trial.")]
