"""`export`: a trial of a study, or a configuration, as a bundle or as a file of another format."""

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
    Storage,
    Target,
    Threads,
    Weights,
)
from qsearch.commands.subject import ModelOptions
from qsearch.commands.terminal import print_json, say, stdout_reserved

__all__ = ["export"]


def export(
    out: Annotated[
        Path, typer.Option(help="Directory to write, with --all one directory per trial inside it; a file for onnx and pt2.")
    ],
    study: Annotated[str | None, typer.Option(help="Name of the study.")] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Instead of a trial: a configuration file, or a precision for every layer such as int8, of --model."),
    ] = None,
    model: Model = "demo",
    weights: Weights = None,
    data: Data = None,
    target: Target = "llvm",
    threads: Threads = 1,
    batch: Batch = 1,
    seed: Seed = 0,
    preprocessing: Preprocessing = None,
    convert_channels: ConvertChannels = False,
    storage: Storage = None,
    trial: Annotated[int | None, typer.Option(min=0, help="Number of the trial; default: --pick.")] = None,
    pick: Annotated[str | None, typer.Option(help="knee, fastest, smallest or most-accurate.", show_default="knee")] = None,
    max_loss_pp: Annotated[
        float | None, typer.Option(help="Pick only among points that lose at most so many percentage points.")
    ] = None,
    all_points: Annotated[bool, typer.Option("--all", help="Export every point of the front.")] = False,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="Measure trials whose kernels have changed again, and say so in the bundle.")
    ] = False,
    kind: Annotated[
        str,
        typer.Option("--format", help="bundle; onnx: quantized operators as ONNX has them; pt2: fake-quantized, torch.export."),
    ] = "bundle",
    force: Annotated[
        bool, typer.Option("--force", help="onnx, pt2: write the file although it decides too often otherwise than the module.")
    ] = False,
    with_preprocess: Annotated[
        bool,
        typer.Option(
            "--with-preprocess", help="Bundles of classifiers: the module takes resized and cropped pixels and gives the class."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Export a trial: the compiled module with everything needed to run and check it; or an ONNX or torch.export file."""
    from qsearch.errors import UsageError
    from qsearch.search.study import load_study
    from qsearch.session.export_session import BUNDLE, ExportRequest, export_configuration, run_export

    if (study is None) == (config is None):
        raise UsageError("give either --study, or --config with --model")
    options = ModelOptions(model, weights, data, target, threads, seed, preprocessing, convert_channels, batch)
    of_study = {"--trial": trial is not None, "--pick": pick, "--max-loss-pp": max_loss_pp is not None, "--all": all_points}
    of_study |= {"--storage": storage, "--remeasure": remeasure}
    if stray := options.given() if study else [option for option, value in of_study.items() if value]:
        raise UsageError(f"{' and '.join(stray)} and {'--study' if study else '--config'} contradict each other: leave one out")
    as_file = kind != BUNDLE
    if (force and not as_file) or (as_file and (all_points or remeasure or with_preprocess)):
        raise UsageError("--force is for --format onnx and pt2; --all, --remeasure and --with-preprocess are for bundles")
    chosen = {"--trial": trial is not None, "--pick": pick is not None, "--all": all_points}
    given = [option for option, is_given in chosen.items() if is_given]
    if len(given) > 1 or (max_loss_pp is not None and given in (["--trial"], ["--all"])):
        given += [] if max_loss_pp is None else ["--max-loss-pp"]
        raise UsageError(f"{' and '.join(given)} contradict each other: give one of --trial, --all, or --pick with --max-loss-pp")
    request = ExportRequest(out, trial, pick or "knee", max_loss_pp, all_points, remeasure, with_preprocess, kind, force)
    if config is not None:
        with stdout_reserved():
            rows = export_configuration(options.settings(), config, request, say)
    else:
        handle = load_study(study or "", storage)
        with stdout_reserved():
            rows = run_export(handle, request, say)
    if json:
        print_json({"study": study, "files" if as_file else "bundles": rows})
