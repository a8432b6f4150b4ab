"""`evaluate`: precisions side by side, without a search."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qsearch.commands.options import (
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

if TYPE_CHECKING:
    from qsearch.config import QuantConfig
    from qsearch.report.tables import EvaluateRow
    from qsearch.search.evaluation.model_evaluator import ModelEvaluator
    from qsearch.search.space import SearchSpace

__all__ = ["evaluate"]


def evaluate(
    model: Model = "demo",
    weights: Weights = None,
    data: Data = None,
    target: Target = "llvm",
    threads: Threads = 1,
    batch: Annotated[str, typer.Option(help="Comma-separated numbers of images of one inference, for example 1,8,32.")] = "1",
    precision: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: fp32, tf32, fp16, int16, int8, fp8, w4a8, or JSON files.",
            show_default="fp32,int8 without --preset",
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Comma-separated: presets of spaces/, or YAML files; what their 'start' stands for.")
    ] = None,
    split: Annotated[str, typer.Option(help="search or heldout: which images.")] = "search",
    seed: Seed = 0,
    preprocessing: Preprocessing = None,
    task: Task = None,
    convert_channels: ConvertChannels = False,
    cost_table: CostTable = None,
    rpc: Rpc = None,
    rpc_key: RpcKey = None,
    json: Json = False,
) -> None:
    """Measure precisions of a model: latency, memory, speed-up, accuracy."""
    from qsearch.config import named_config
    from qsearch.errors import UsageError
    from qsearch.search.evaluation.evaluator import Settings
    from qsearch.search.space import load_space

    if split not in ("search", "heldout"):
        raise UsageError(f"unknown split {split!r}: use search or heldout")
    given = ("fp32,int8" if preset is None else "fp32") if precision is None else precision
    names = [name.strip() for name in given.split(",") if name.strip()]
    if not names:
        raise UsageError("--precision names nothing: use for example fp32,int8")
    configs = {name: named_config(name) for name in names}
    spaces = {name.strip(): load_space(name.strip()) for name in (preset or "").split(",") if name.strip()}
    batches = _batches(batch)
    settings = Settings(
        *(model, weights, data, target, convert_channels, preprocessing, seed),
        threads=threads,
        task=checked_task(task),
        cost_table=cost_table,
        rpc=rpc,
        rpc_key=rpc_key,
    )
    with stdout_reserved():
        from dataclasses import asdict, replace

        from qsearch.report.tables import evaluate_table, hidden_speedups
        from qsearch.search.evaluation.objective import prepare_evaluator

        rows: list[EvaluateRow] = []
        for images in batches:
            evaluator = prepare_evaluator(replace(settings, batch=images), say, {**configs, **spaces})
            shared = evaluator.dataset.search_half_calibrating
            if split == "search" and shared and not rows:
                say(f"{shared} of the search images also calibrate: labels.csv marks none for calibration")
            rows += _rows(evaluator, _asked(evaluator, configs, spaces), "search_half" if split == "search" else split)
    hidden = hidden_speedups(rows)
    if json:
        facts = {"model": model, "target": evaluator.target.description, "split": split, "task": evaluator.profile.task}
        facts |= {} if evaluator.away is None else {"device": evaluator.away.description}
        found = [asdict(row) | {"images_per_s": row.images_per_s} for row in rows]
        print_json(facts | {"rows": found, "hidden_at_batch_1": hidden})
        return
    title = f"{model} on {rows[0].images} {split} images, {evaluator.target.description}"
    if evaluator.away is not None:
        title += f"; latency {rows[0].latency_source} for {evaluator.away.description}, accuracy measured on this machine"
    print_table(evaluate_table(rows, title))
    for sentence in hidden:
        say(sentence)


def _asked(
    evaluator: ModelEvaluator, configs: Mapping[str, QuantConfig], spaces: Mapping[str, SearchSpace]
) -> dict[str, QuantConfig]:
    """Name -> configuration of all that is compared, with the defaults of what the model is for."""
    from qsearch.search.bound_space import bind_space

    found = dict(configs)
    for name, space in spaces.items():
        bound = bind_space(evaluator.profile.space(space), evaluator.graph)
        found[name] = bound.config(bound.start_values())
    if not evaluator.profile.precise:
        return found
    # A file says itself what each layer is.
    return {name: one if name.endswith(".json") else evaluator.profile.config(one) for name, one in found.items()}


def _rows(evaluator: ModelEvaluator, configs: Mapping[str, QuantConfig], part: str) -> list[EvaluateRow]:
    """What was measured of each."""
    from qsearch.report.tables import EvaluateRow

    rows = []
    for name, (latency, memory, accuracy, speedup) in evaluator.compare(configs, part).items():
        shown = Path(name).stem if name.endswith((".json", ".yaml", ".yml")) else name
        scores = (accuracy.top1, accuracy.top5, accuracy.images, accuracy.metric, accuracy.second_metric, latency.source)
        rows.append(EvaluateRow(shown, latency.median_ms, memory.peak_bytes, speedup, *scores, batch=evaluator.batch))
    return rows


def _batches(text: str) -> list[int]:
    """Numbers of images, ascending.

    Raises:
        UsageError: One is no positive integer.
    """
    from qsearch.errors import UsageError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--batch {text!r} is no list of positive numbers: use for example 1,8,32")
    return sorted({int(part) for part in parts})
