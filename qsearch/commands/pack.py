"""`pack` and `measure-pack`: the kernels of a model in one file, measured wherever their device is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    Trust,
    Weights,
    checked_task,
)
from qsearch.commands.terminal import print_json, say, stdout_reserved

__all__ = ["measure_pack", "pack"]


def pack(
    out: Annotated[Path, typer.Option(help="File to write.")],
    model: Model = "demo",
    weights: Weights = None,
    data: Data = None,
    target: Target = "llvm",
    threads: Threads = 1,
    batch: Batch = 1,
    space: Annotated[str, typer.Option(help="Search space whose kernels are packed: a YAML file or a preset.")] = "default",
    tiles: Annotated[int, typer.Option(min=1, help="Register tiles to compile per dense convolution, of which one wins.")] = 3,
    seed: Seed = 0,
    preprocessing: Preprocessing = None,
    task: Task = None,
    convert_channels: ConvertChannels = False,
    json: Json = False,
) -> None:
    """Pack the kernels of a search space, compiled for a target, into one file that checks and times them elsewhere."""
    from qsearch.errors import UsageError
    from qsearch.search.evaluation.evaluator import Settings
    from qsearch.search.space import load_space

    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UsageError(f"--out: expected a file in a directory that exists, such as kernels.pack, got {out}")
    chosen = load_space(space)
    settings = Settings(
        model, weights, data, target, convert_channels, preprocessing, seed, threads=threads, batch=batch, task=checked_task(task)
    )
    with stdout_reserved():
        from qsearch.search.evaluation.pack_kernels import pack_kernels

        found = pack_kernels(settings, chosen, out, tiles, say)
    say(f"{found['kernels']} kernels -> {out} ({found['bytes']:,} bytes); on the device: python {out.name} --out table.json")
    if json:
        print_json({"model": model, "pack": str(out), **found})


def measure_pack(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A pack.")],
    out: Annotated[Path | None, typer.Option(help="Cost table to write.", show_default="FILE with .table.json")] = None,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Check every kernel of a pack on this machine's device and time it; write the cost table for `search --cost-table`."""
    from qsearch.errors import UsageError
    from qsearch.measure.devices.run_pack import measure_pack_file

    table = out or file.with_suffix(".table.json")
    if table.is_dir() or not table.absolute().parent.is_dir():
        raise UsageError(f"--out: expected a file in a directory that exists, such as table.json, got {table}")
    found = measure_pack_file(file, table, trust)
    for symbol, problem in found["problems"].items():
        say(f"wrong: {symbol}: {problem}")
    say(f"{found['kernels']} kernels on {found['device']}, {found['wrong']} of them wrong -> {table}")
    if json:
        print_json(found)
    if found["wrong"]:
        raise typer.Exit(1)
