"""One run of an export: choose what is exported, open its model and images as they were, write bundles or a file.

Imports everything heavy, within the functions: what is wrong with the request itself is said before.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsearch.config import QuantConfig, named_config
from qsearch.errors import StudyError
from qsearch.export.bundle import require_vacant
from qsearch.measure.measurement import Measurement
from qsearch.report.documents import baseline_of, settings_of
from qsearch.search.evaluation.evaluator import Progress, Settings
from qsearch.search.front import FLOAT_TRIAL, FrontPoint, kept_points, pick, study_front, study_point
from qsearch.search.study import StudyHandle, recorded_parts

if TYPE_CHECKING:
    from qsearch.search.evaluation.objective import ModelEvaluator

__all__ = ["BUNDLE", "ExportRequest", "export_configuration", "run_export"]

NOTHING_BEATS_FLOAT = "nothing that was tried beats float in any objective: float itself is exported"
BUNDLE = "bundle"


@dataclass(frozen=True)
class ExportRequest:
    """What the user asked for.

    Attributes:
        out: Directory to write; for all points, one directory per point inside it; a file for other formats than bundles.
        trial: Number of the trial; None to pick.
        pick: How to pick, see `qsearch.search.front.pick`.
        max_loss_pp: Pick only among points that lose at most so much, percentage points.
        all_points: Every point of the front.
        remeasure: Measure trials whose kernels have changed again, and say so in the bundle.
        with_preprocess: The modules take pixels and give the index of the class.
        kind: BUNDLE, onnx or pt2.
        force: Write an onnx or pt2 file although it decides too often otherwise than the module.
    """

    out: Path
    trial: int | None = None
    pick: str = "knee"
    max_loss_pp: float | None = None
    all_points: bool = False
    remeasure: bool = False
    with_preprocess: bool = False
    kind: str = BUNDLE
    force: bool = False


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

    def what(self, point: FrontPoint) -> str:
        """A point in words."""
        return self.config or ("float" if point.number is None else f"trial {point.number}")


def run_export(handle: StudyHandle, request: ExportRequest, progress: Progress) -> list[dict[str, Any]]:
    """Export trials of a study.

    Args:
        handle: The study.
        request: What is wanted of it.
        progress: Called whenever a slow step begins, and with what was written.

    Returns:
        For each bundle what `export_point` tells of it; for a file what `export_file` does, and its trial.

    Raises:
        QSearchError: The request cannot be carried out.
    """
    with handle.guard():
        baseline, points = baseline_of(handle), _points(handle, request)
        settings, parts = settings_of(handle), recorded_parts(handle.study)
    if baseline is None:
        raise StudyError(f"study {handle.name!r} does not know its float module; run its search command once more")
    if points[0].number is None:
        progress(NOTHING_BEATS_FLOAT)
    source = _Source(settings, study=handle.name, points=tuple(points), baseline=baseline, parts=dict(parts))
    return _export(source, request, progress)


def export_configuration(settings: Settings, name: str, request: ExportRequest, progress: Progress) -> list[dict[str, Any]]:
    """Export a configuration that no study has measured; a bundle's is measured first.

    Args:
        settings: Model, images and target.
        name: A precision for every layer, or a configuration file.
        request: What is wanted of it; its choice of trials does not count.
        progress: As of `run_export`.

    Returns:
        As of `run_export`.

    Raises:
        QSearchError: The request cannot be carried out.
    """
    return _export(_Source(settings, config=name), request, progress)


def _points(handle: StudyHandle, request: ExportRequest) -> list[FrontPoint]:
    if request.trial is not None:
        return [study_point(handle.study, request.trial)]
    front = study_front(handle.study)
    picked, kept = pick(front, request.pick, request.max_loss_pp, baseline_of(handle)), list(kept_points(front))
    return kept if request.all_points and kept and picked.number is not None else [picked]


def _export(source: _Source, request: ExportRequest, progress: Progress) -> list[dict[str, Any]]:
    write = _write_bundles if request.kind == BUNDLE else _write_file
    return write(source, request, progress)


def _open(source: _Source, progress: Progress) -> ModelEvaluator:
    """Load the model and its images; those of a study must be the ones it measured."""
    from qsearch.export.from_study import check_identity
    from qsearch.search.evaluation.objective import prepare_evaluator

    asked = {} if source.config is None else {source.config: named_config(source.config)}
    evaluator = prepare_evaluator(source.settings, progress, asked)
    if source.study is not None:
        check_identity(source.study, source.parts, evaluator.identity)
    return evaluator


def _write_bundles(source: _Source, request: ExportRequest, progress: Progress) -> list[dict[str, Any]]:
    names = [source.what(point).replace(" ", "-") for point in source.points]
    directories = [request.out / name for name in names] if request.all_points else [request.out]
    for directory in directories:
        # Said before the model is loaded, and before the first of many bundles is written.
        require_vacant(directory)

    from qsearch.export.from_study import check_kernels, export_point, require_pictures

    evaluator = _open(source, progress)
    if request.with_preprocess:
        require_pictures(evaluator)
    if source.config is not None:
        progress(f"measuring float and {source.config}")
        chosen = named_config(source.config)
        point = FrontPoint(FLOAT_TRIAL, chosen, evaluator.evaluate(chosen))
        source = replace(source, points=(point,), baseline=evaluator.baseline)
    elif not request.remeasure:
        check_kernels(evaluator, source.points)
    if evaluator.away is not None:
        progress(f"compiling for {evaluator.target.description}, which is not run here; `verify` the bundle on the device")
    assert source.baseline is not None
    rows = []
    for point, directory in zip(source.points, directories, strict=True):
        rows.append(export_point(evaluator, point, source.baseline, directory, request.with_preprocess))
        again = ", measured again" if rows[-1]["remeasured"] else ""
        progress(f"{source.what(point)} -> {directory} ({rows[-1]['module_bytes']:,} bytes{again})")
    return rows


def _write_file(source: _Source, request: ExportRequest, progress: Progress) -> list[dict[str, Any]]:
    from qsearch.export.file_formats import export_file, require_writable

    # Said before the model is loaded.
    require_writable(request.out, request.kind)
    evaluator = _open(source, progress)
    config: QuantConfig = named_config(source.config) if source.config else source.points[0].config
    row = export_file(evaluator, config, request.out, request.kind, request.force)  # type: ignore[arg-type]
    what = source.config or source.what(source.points[0])
    progress(f"{what} -> {request.out} ({row['bytes']:,} bytes)")
    return [row | {"trial": source.points[0].number if source.points else None}]
