"""`tables`: what every layer of a model costs and what quantizing it does to the outputs, most sensitive first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qsearch.commands.options import (
    Batch,
    ConvertChannels,
    CostTable,
    Data,
    Json,
    Model,
    Preprocessing,
    Rpc,
    RpcKey,
    Seed,
    Target,
    Task,
    Threads,
    Weights,
    checked_task,
)
from qsearch.commands.terminal import print_json, print_table, say, stdout_reserved

__all__ = ["tables"]


def tables(
    model: Model = "demo",
    weights: Weights = None,
    data: Data = None,
    target: Target = "llvm",
    threads: Threads = 1,
    batch: Batch = 1,
    space: Annotated[str, typer.Option(help="Search space: a YAML file or the name of a preset.")] = "default",
    seed: Seed = 0,
    preprocessing: Preprocessing = None,
    task: Task = None,
    convert_channels: ConvertChannels = False,
    cost_table: CostTable = None,
    rpc: Rpc = None,
    rpc_key: RpcKey = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file to write a picture of the tables to.")] = None,
    json: Json = False,
) -> None:
    """Measure the planner's tables: each layer's cost and sensitivity at each precision, most sensitive first."""
    from qsearch.errors import UsageError
    from qsearch.search.evaluation.evaluator import Settings
    from qsearch.search.space import load_space

    if plot is not None and (plot.suffix.lower() != ".png" or plot.is_dir() or not plot.parent.is_dir()):
        raise UsageError(f"--plot: expected a PNG file in a directory that exists, such as tables.png, got {plot}")
    chosen = load_space(space)
    settings = Settings(
        *(model, weights, data, target, convert_channels, preprocessing, seed),
        threads=threads,
        batch=batch,
        task=checked_task(task),
        cost_table=cost_table,
        rpc=rpc,
        rpc_key=rpc_key,
    )

    from qsearch.search.bound_space import bind_space
    from qsearch.search.evaluation.objective import open_evaluator
    from qsearch.search.tables.layer_tables import layer_rows
    from qsearch.search.tables.measure_tables import measure_tables

    with stdout_reserved():
        evaluator = open_evaluator(settings, say, {chosen.name: chosen})
        bound = bind_space(evaluator.profile.space(chosen), evaluator.graph, evaluator.idle_methods)
        measured = measure_tables(evaluator, bound, say)
    rows = layer_rows(bound, measured)
    if not rows:
        raise UsageError(f"space {chosen.name!r} leaves no layer of {model} a choice, so there is nothing to tabulate")
    if plot is not None:
        _draw(model, rows, plot)
    if json:
        print_json({"model": model, "layers": rows, "seconds": evaluator.seconds})
        return
    _print(model, rows)


def _draw(model: str, rows: list[dict[str, Any]], file: Path) -> None:
    from qsearch.errors import UsageError
    from qsearch.report.table_pictures import draw_tables
    from qsearch.whole_files import write_whole

    try:
        with write_whole(file) as stream:
            draw_tables(rows, f"{model}: cost and sensitivity of every layer").save(stream, format="PNG", optimize=True)
    except OSError as error:
        raise UsageError(f"--plot: {file} cannot be written: {error.strerror or error}; give another file") from error
    say(f"picture of the tables -> {file}")


def _print(model: str, rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(title=f"layers of {model}, most sensitive first, against their first precision", title_justify="left")
    for name in ("layer", "precision", "divergence, nats", "latency, us", "weights, bytes"):
        table.add_column(name, justify="left" if name in ("layer", "precision") else "right")
    for row in rows:
        numbers = (f"{row['divergence']:.2e}", f"{1e3 * row['latency_ms']:+.1f}", f"{row['weight_bytes']:+.0f}")
        table.add_row(row["layer"], row["precision"], *numbers)
    print_table(table)
