"""Options that several verbs have in common."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "ConvertChannels",
    "Data",
    "Json",
    "Model",
    "Preprocessing",
    "Seed",
    "Storage",
    "Study",
    "Target",
    "Threads",
    "Weights",
    "default_study",
]

Model = Annotated[str, typer.Option(help="demo, efficientnet_lite0, torchvision:NAME, package.module:factory, or a .pt2 file.")]
Weights = Annotated[Path | None, typer.Option(help="Checkpoint to load instead of the model's own weights.")]
Data = Annotated[
    Path | None,
    typer.Option(help="Directory of images: one folder per class, or labels.csv. Default: the model's own images."),
]
Target = Annotated[
    str, typer.Option(help="CPU to compile for: host (or llvm), portable, or an LLVM name such as icelake-server.")
]
Threads = Annotated[int, typer.Option(min=1, help="Threads that a module runs on.")]
ConvertChannels = Annotated[
    bool, typer.Option("--convert-channels", help="Convert grey images to colour, or the reverse, where the model needs it.")
]
Preprocessing = Annotated[Path | None, typer.Option(help="File that overrides the model's preprocessing.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random choice.")]
Study = Annotated[str, typer.Option(help="Name of the study.")]
Storage = Annotated[
    str | None, typer.Option(help="SQLAlchemy URL of the study's database.", show_default="sqlite:///studies/STUDY.db")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of a table.")]


def default_study(model: str) -> str:
    """A study name for a model: 'torchvision:resnet18' -> 'torchvision-resnet18', 'nets/a.pt2' -> 'a'."""
    name = Path(model).stem if model.endswith(".pt2") else model
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:100] or "study"
