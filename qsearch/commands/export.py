"""`export`: a trial of a study, or a configuration, as a bundle or as a file of another format."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qsearch.commands.options import ConvertChannels, Data, Json, Model, Preprocessing, Seed, Storage, Target, Threads, Weights
from qsearch.commands.terminal import print_json, say, stdout_reserved

if TYPE_CHECKING:
    from qsearch.measure.measurement import Measurement
    from qsearch.search.evaluation.evaluator import Settings
    from qsearch.search.evaluation.objective import ModelEvaluator
    from qsearch.search.front import FrontPoint

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
    from qsearch.search.evaluation.evaluator import Settings

    if (study is None) == (config is None):
        raise UsageError("give either --study, or --config with --model")
    own = {"--model": model != "demo", "--weights": weights, "--data": data, "--target": target != "llvm", "--seed": seed}
    own |= {"--threads": threads != 1, "--preprocessing": preprocessing, "--convert-channels": convert_channels}
    of_study = {"--trial": trial is not None, "--pick": pick, "--max-loss-pp": max_loss_pp is not None, "--all": all_points}
    of_study |= {"--storage": storage, "--remeasure": remeasure}
    if stray := [option for option, value in (own if study else of_study).items() if value]:
        raise UsageError(f"{' and '.join(stray)} and {'--study' if study else '--config'} contradict each other: leave one out")
    as_file = kind != "bundle"
    if (force and not as_file) or (as_file and (all_points or remeasure or with_preprocess)):
        raise UsageError("--force is for --format onnx and pt2; --all, --remeasure and --with-preprocess are for bundles")
    if study is None:
        settings = Settings(model, weights, data, target, convert_channels, preprocessing, seed, threads=threads)
        source = _Source(settings, config=config)
    else:
        source = _of_study(study, storage, _Choice(trial, pick, max_loss_pp, all_points))
    bundles = _Bundles(all_points, remeasure, with_preprocess)
    rows = _write_file(source, out, kind, force) if as_file else _write_bundles(source, out, bundles)
    if json:
        print_json({"study": study, "files" if as_file else "bundles": rows})


@dataclass(frozen=True)
class _Choice:
    """Which trials of a study."""

    trial: int | None
    pick: str | None
    max_loss_pp: float | None
    all_points: bool


@dataclass(frozen=True)
class _Source:
    """What is exported.

    Attributes:
        settings: Model, images and target.
        config: Name or file of a configuration; None for trials.
        study: Name of the study of trials.
        points: The trials.
        baseline: The study's float module.
        parts: Name of a part (model, data, target) -> fingerprint, as the study keeps them.
    """

    settings: Settings
    config: str | None = None
    study: str | None = None
    points: tuple[FrontPoint, ...] = ()
    baseline: Measurement | None = None
    parts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Bundles:
    """How bundles are written."""

    all_points: bool
    remeasure: bool
    with_preprocess: bool


def _of_study(study: str, storage: str | None, choice: _Choice) -> _Source:
    """The chosen trials of a study."""
    from qsearch.errors import UsageError
    from qsearch.report.documents import baseline_of, settings_of
    from qsearch.search.front import kept_points, study_front, study_point
    from qsearch.search.front import pick as pick_point
    from qsearch.search.study import load_study, recorded_parts

    chosen = {"--trial": choice.trial is not None, "--pick": choice.pick is not None, "--all": choice.all_points}
    given = [option for option, is_given in chosen.items() if is_given]
    if len(given) > 1 or (choice.max_loss_pp is not None and given in (["--trial"], ["--all"])):
        given += [] if choice.max_loss_pp is None else ["--max-loss-pp"]
        raise UsageError(f"{' and '.join(given)} contradict each other: give one of --trial, --all, or --pick with --max-loss-pp")
    handle = load_study(study, storage)
    with handle.guard():
        front, baseline = study_front(handle.study), baseline_of(handle)
        if choice.trial is not None:
            points = [study_point(handle.study, choice.trial)]
        else:
            picked, kept = pick_point(front, choice.pick or "knee", choice.max_loss_pp, baseline), list(kept_points(front))
            points = kept if choice.all_points and kept and picked.number is not None else [picked]
        settings, parts = settings_of(handle), recorded_parts(handle.study)
    if points[0].number is None:
        say("nothing that was tried beats float in any objective: float itself is exported")
    return _Source(settings, study=study, points=tuple(points), baseline=baseline, parts=parts)


def _open(source: _Source) -> ModelEvaluator:
    """Load the model and its images; those of a study must be the ones it measured."""
    from qsearch.config import named_config
    from qsearch.export.from_study import check_identity
    from qsearch.search.evaluation.objective import prepare_evaluator

    asked = {} if source.config is None else {source.config: named_config(source.config)}
    evaluator = prepare_evaluator(source.settings, say, asked)
    if source.study is not None:
        check_identity(source.study, source.parts, evaluator.identity)
    return evaluator


def _write_bundles(source: _Source, out: Path, how: _Bundles) -> list[dict[str, Any]]:
    from qsearch.export.bundle import require_vacant

    names = ["float" if point.number is None else f"trial-{point.number}" for point in source.points] or [source.config or ""]
    directories = [out / name if how.all_points else out for name in names]
    for directory in directories:
        # Said before the model is loaded, and before the first of many bundles is written.
        require_vacant(directory)
    with stdout_reserved():
        from qsearch.export.from_study import check_kernels, export_point, require_pictures

        evaluator = _open(source)
        if how.with_preprocess:
            require_pictures(evaluator)
        if source.config is not None:
            source = _measured(source, evaluator)
        elif not how.remeasure:
            check_kernels(evaluator, source.points)
        if evaluator.away is not None:
            say(f"compiling for {evaluator.target.description}, which is not run here; `verify` the bundle on the device")
        assert source.baseline is not None
        rows = []
        for point, directory in zip(source.points, directories, strict=True):
            rows.append(export_point(evaluator, point, source.baseline, directory, how.with_preprocess))
            again = ", measured again" if rows[-1]["remeasured"] else ""
            what = source.config or ("float" if point.number is None else f"trial {point.number}")
            say(f"{what} -> {directory} ({rows[-1]['module_bytes']:,} bytes{again})")
    return rows


def _measured(source: _Source, evaluator: ModelEvaluator) -> _Source:
    """A configuration with what its module shows now, as if it were a trial."""
    from qsearch.config import named_config
    from qsearch.search.front import FLOAT_TRIAL, FrontPoint

    say(f"measuring float and {source.config}")
    chosen = named_config(source.config or "")
    point = FrontPoint(FLOAT_TRIAL, chosen, evaluator.evaluate(chosen))
    return replace(source, points=(point,), baseline=evaluator.baseline)


def _write_file(source: _Source, out: Path, kind: str, force: bool) -> list[dict[str, Any]]:
    from qsearch.config import named_config
    from qsearch.export.file_formats import export_file, require_writable

    # Said before the model is loaded.
    require_writable(out, kind)
    with stdout_reserved():
        evaluator = _open(source)
        config = named_config(source.config) if source.config else source.points[0].config
        row = export_file(evaluator, config, out, kind, force)  # type: ignore[arg-type]
    what = source.config or ("float" if source.points[0].number is None else f"trial {source.points[0].number}")
    say(f"{what} -> {out} ({row['bytes']:,} bytes)")
    return [row | {"trial": source.points[0].number if source.points else None}]
