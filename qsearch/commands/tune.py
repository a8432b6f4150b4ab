"""`tune`: time a few register tiles per kernel of a model, once for all studies on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from qsearch.commands.options import (
    Batch,
    ConvertChannels,
    Data,
    Json,
    Model,
    Preprocessing,
    Seed,
    Target,
    Task,
    Threads,
    Weights,
    checked_task,
)
from qsearch.commands.terminal import print_json, print_table, say, stdout_reserved

if TYPE_CHECKING:
    from qsearch.build.target import Tile
    from qsearch.measure.tune import TunedKernel
    from qsearch.search.evaluation.evaluator import Settings

__all__ = ["tune", "tune_model"]


def tune(
    model: Model = "demo",
    weights: Weights = None,
    data: Data = None,
    target: Target = "llvm",
    threads: Threads = 1,
    batch: Batch = 1,
    precision: Annotated[str, typer.Option(help="Comma-separated precisions whose kernels are tuned.")] = "fp32,int8",
    seconds: Annotated[float, typer.Option(min=0.0, help="Begin no kernel after this time.")] = 300.0,
    seed: Seed = 0,
    preprocessing: Preprocessing = None,
    task: Task = None,
    convert_channels: ConvertChannels = False,
    json: Json = False,
) -> None:
    """Time a few register tiles per distinct kernel and remember the fastest; later searches use them."""
    from qsearch.config import named_config
    from qsearch.errors import UsageError
    from qsearch.search.evaluation.evaluator import Settings

    names = [name.strip() for name in precision.split(",") if name.strip()]
    if not names:
        raise UsageError("--precision names nothing: use for example fp32,int8")
    for name in names:
        named_config(name)
    settings = Settings(
        model, weights, data, target, convert_channels, preprocessing, seed, threads=threads, batch=batch, task=checked_task(task)
    )
    with stdout_reserved():
        found = tune_model(settings, names, seconds)
    if json:
        print_json({"model": model, "kernels": [asdict(kernel) for kernel in found]})
        return

    from rich.table import Table

    table = Table(title=f"{len(found)} kernels of {model}", title_justify="left")
    for name in ("layer", "precision", "predicted tile", "fastest tile", "gain"):
        table.add_column(name)
    for kernel in sorted(found, key=lambda kernel: -kernel.gain):
        tiles = map(_words, (kernel.predicted, kernel.chosen))
        table.add_row(kernel.op, kernel.precision, *tiles, f"{kernel.gain:.2f}")
    print_table(table)


def _words(tile: Tile) -> str:
    """A tile as a person reads it."""
    from qsearch.kernels import cpu

    if isinstance(tile, cpu.Tile):
        return f"{tile.rows} x {tile.cols} pixels, {tile.columns} vectors"
    return f"{tile.rows} pixels, {tile.columns} channels, {tile.depth} bytes, {tile.stages} stages"


def tune_model(settings: Settings, precisions: Sequence[str], seconds: float) -> list[TunedKernel]:
    """Tune the kernels of a model at some precisions, with a progress bar.

    Args:
        settings: The model, its images and the target.
        precisions: Precision names or configuration files.
        seconds: No kernel is begun after this time.

    Returns:
        A record for every kernel that had not been tuned before.
    """
    from qsearch.commands.tune_progress import TuneProgress
    from qsearch.config import named_config
    from qsearch.search.evaluation.objective import prepare_evaluator

    configs = {name: named_config(name) for name in precisions}
    evaluator = prepare_evaluator(settings, say, configs)
    with TuneProgress() as progress:
        return evaluator.tune(list(configs.values()), seconds, progress.on_kernel)
