"""One run of an export: choose points of a study, open its model and images as they were, write a bundle of each.

Imports everything heavy, within the function: what is wrong with the request itself is said before.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsearch.errors import StudyError
from qsearch.export.bundle import require_vacant
from qsearch.report.documents import baseline_of, settings_of
from qsearch.search.evaluation.evaluator import Progress
from qsearch.search.front import FrontPoint, kept_points, pick, study_front, study_point
from qsearch.search.study import StudyHandle, recorded_parts

__all__ = ["ExportRequest", "run_export"]

NOTHING_BEATS_FLOAT = "nothing that was tried beats float in any objective: float itself is exported"


@dataclass(frozen=True)
class ExportRequest:
    """What the user asked for.

    Attributes:
        out: Directory to write; for all points, one directory per point inside it.
        trial: Number of the trial; None to pick.
        pick: How to pick, see `qsearch.search.front.pick`.
        max_loss_pp: Pick only among points that lose at most so much, percentage points.
        all_points: Every point of the front.
        remeasure: Measure trials whose kernels have changed again, and say so in the bundle.
    """

    out: Path
    trial: int | None = None
    pick: str = "knee"
    max_loss_pp: float | None = None
    all_points: bool = False
    remeasure: bool = False


def run_export(handle: StudyHandle, request: ExportRequest, progress: Progress) -> list[dict[str, Any]]:
    """Write bundles.

    Args:
        handle: The study.
        request: What is wanted of it.
        progress: Called whenever a slow step begins, and with what was written.

    Returns:
        For each bundle what `export_point` tells of it.

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
    names = ["float" if point.number is None else f"trial-{point.number}" for point in points]
    directories = [request.out / name if request.all_points else request.out for name in names]
    for directory in directories:
        # Said before the model is loaded, and before the first of many bundles is written.
        require_vacant(directory)

    from qsearch.export.from_study import check_identity, check_kernels, export_point
    from qsearch.search.evaluation.objective import prepare_evaluator

    evaluator = prepare_evaluator(settings, progress)
    check_identity(handle.name, parts, evaluator.identity)
    if not request.remeasure:
        check_kernels(evaluator, points)
    if evaluator.away is not None:
        progress(f"compiling for {evaluator.target.description}, which is not run here; `verify` the bundle on the device")
    rows = []
    for point, directory in zip(points, directories, strict=True):
        rows.append(export_point(evaluator, point, baseline, directory))
        again = ", measured again" if rows[-1]["remeasured"] else ""
        what = "float" if point.number is None else f"trial {point.number}"
        progress(f"{what} -> {directory} ({rows[-1]['module_bytes']:,} bytes{again})")
    return rows


def _points(handle: StudyHandle, request: ExportRequest) -> list[FrontPoint]:
    if request.trial is not None:
        return [study_point(handle.study, request.trial)]
    front = study_front(handle.study)
    picked, kept = pick(front, request.pick, request.max_loss_pp, baseline_of(handle)), list(kept_points(front))
    return kept if request.all_points and kept and picked.number is not None else [picked]
