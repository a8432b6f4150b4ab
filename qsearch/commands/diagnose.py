"""`diagnose`: why a configuration lost accuracy, and which remedy gains how much."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qsearch.commands.options import ConvertChannels, Data, Json, Model, Preprocessing, Seed, Storage, Target, Threads, Weights
from qsearch.commands.subject import ModelOptions, Subject, chosen_subject
from qsearch.commands.terminal import print_json, print_table, say, stdout_reserved

if TYPE_CHECKING:
    from qsearch.search.diagnosis.diagnosis import Diagnosis

__all__ = ["diagnose"]


def diagnose(
    study: Annotated[
        str | None, typer.Option(help="Study that holds the trial; model, images and target are the study's.")
    ] = None,
    trial: Annotated[int | None, typer.Option(min=0, help="Number of the trial.", show_default="the front's knee")] = None,
    config: Annotated[
        str | None, typer.Option(help="Configuration: a JSON file, or a precision for every layer such as int8.")
    ] = None,
    model: Model = "demo",
    weights: Weights = None,
    data: Data = None,
    target: Target = "llvm",
    threads: Threads = 1,
    seed: Seed = 0,
    preprocessing: Preprocessing = None,
    convert_channels: ConvertChannels = False,
    storage: Storage = None,
    images: Annotated[int, typer.Option(min=1, help="Search images that the errors of layers are found with.")] = 8,
    worst: Annotated[int, typer.Option(min=1, help="Layers, of those that cost most, to try higher precisions in.")] = 3,
    seconds: Annotated[float, typer.Option(min=1.0, help="After so long no further remedy is tried.")] = 120.0,
    plot: Annotated[Path | None, typer.Option(help="PNG file to write a picture of the diagnosis to.")] = None,
    save: Annotated[Path | None, typer.Option(help="JSON file for the configuration with the remedy to try first.")] = None,
    json: Json = False,
) -> None:
    """Say why a configuration lost accuracy: layers, clipping, dead channels, calibration; and measure what would help."""
    options = ModelOptions(model, weights, data, target, threads, seed, preprocessing, convert_channels)
    subject = chosen_subject(study, trial, storage, config, options)
    _check_files(plot, save)
    found, target_description = _find(subject, images, seconds, worst)
    _write(found, subject.title, plot, save)
    if json:
        from qsearch.report.diagnosis_document import diagnosis_document

        head = {"model": subject.settings.model, "study": study, "trial": subject.trial, "target": target_description}
        print_json(head | diagnosis_document(found))
        return
    _print(found, subject.title, seconds)


def _find(subject: Subject, images: int, seconds: float, worst: int) -> tuple[Diagnosis, str]:
    """The diagnosis, and what it was compiled for."""
    with stdout_reserved():
        from qsearch.export.from_study import check_identity
        from qsearch.search.diagnosis.diagnosis import DiagnosisLimits
        from qsearch.search.diagnosis.diagnosis import diagnose as find
        from qsearch.search.evaluation.objective import prepare_evaluator

        evaluator = prepare_evaluator(subject.settings, say, {subject.title: subject.config})
        if subject.study is not None:
            check_identity(subject.study, subject.parts, evaluator.identity)
        if evaluator.away is not None:
            say(f"latencies of remedies are this machine's, not those of {evaluator.away.description}")
        return find(evaluator, subject.config, DiagnosisLimits(images, seconds, worst)), evaluator.target.description


def _check_files(plot: Path | None, save: Path | None) -> None:
    """Refuse files that cannot be written, before anything is measured."""
    from qsearch.errors import UsageError

    for option, file, suffix, example in (("--plot", plot, ".png", "diagnosis.png"), ("--save", save, ".json", "better.json")):
        if file is not None and (file.suffix.lower() != suffix or file.is_dir() or not file.parent.is_dir()):
            kind = suffix[1:].upper()
            raise UsageError(f"{option}: expected a {kind} file in a directory that exists, such as {example}, got {file}")


def _write(found: Diagnosis, title: str, plot: Path | None, save: Path | None) -> None:
    from qsearch.errors import UsageError
    from qsearch.whole_files import write_whole

    if plot is not None:
        from qsearch.report.diagnosis_pictures import draw_diagnosis

        try:
            with write_whole(plot) as stream:
                draw_diagnosis(found, title).save(stream, format="PNG", optimize=True)
        except OSError as error:
            raise UsageError(f"--plot: {plot} cannot be written: {error.strerror or error}; give another file") from error
        say(f"picture of the diagnosis -> {plot}")
    if save is not None and found.first is None:
        say(f"no remedy helps for certain: {save} is not written")
    elif save is not None and found.first is not None:
        import json

        text = json.dumps(found.first.candidate.config.to_json(), indent=1) + "\n"
        try:
            with write_whole(save) as stream:
                stream.write(text.encode())
        except OSError as error:
            raise UsageError(f"--save: {save} cannot be written: {error.strerror or error}; give another file") from error
        say(f"configuration with {found.first.candidate.name} -> {save}")


def _print(found: Diagnosis, title: str, seconds: float) -> None:
    from qsearch.report.diagnosis_tables import diagnosis_text

    for part in diagnosis_text(found, title, seconds):
        if isinstance(part, str):
            typer.echo(part)
        else:
            print_table(part)
