"""Tables for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from qsearch.config import QuantConfig
from qsearch.measure.measurement import Accuracy, Latency, Measurement
from qsearch.report.notes import calibration_text
from qsearch.report.pictures import byte_text
from qsearch.search.finetuned import load_finetuned
from qsearch.search.front import FrontPoint, closest_points, kept_points, study_front
from qsearch.search.study import StudyHandle, recorded_parts

__all__ = ["EvaluateRow", "evaluate_table", "finetune_table", "front_table", "front_words", "study_table"]


@dataclass(frozen=True)
class EvaluateRow:
    """One line of the evaluate table.

    Attributes:
        precision: 'fp32', 'int8' or the name of a configuration file.
        latency_ms: Median, milliseconds.
        peak_bytes: Weights, activations and workspace.
        speedup: Float's latency over this one's.
        top1: Percent of `metric`.
        top5: Percent of `second_metric`.
        images: Number of images.
        metric: What `top1` is: top-1, or mAP of a detector.
        second_metric: What `top5` is: top-5, or mAP@50.
        latency_source: measured or modelled.
    """

    precision: str
    latency_ms: float
    peak_bytes: int
    speedup: float
    top1: float
    top5: float
    images: int
    metric: str = "top-1"
    second_metric: str = "top-5"
    latency_source: str = "measured"


def evaluate_table(rows: Sequence[EvaluateRow], title: str) -> Table:
    """The plain comparison of precisions."""
    scores = (f"{rows[0].metric} %", f"{rows[0].second_metric} %")
    table = _table(title, ("precision",), ("latency ms", "memory", "speed-up", *scores))
    for row in rows:
        table.add_row(
            row.precision,
            f"{row.latency_ms:.3f}",
            byte_text(row.peak_bytes),
            f"{row.speedup:.2f}x",
            f"{row.top1:.2f}",
            f"{row.top5:.2f}",
        )
    return table


def study_table(handle: StudyHandle, baseline: Measurement) -> Table:
    """The front of a study; where no trial is within its constraints, those that come closest, under a title that says so."""
    with handle.guard():
        front, closest = study_front(handle.study), closest_points(handle.study)
        parts, tuned = recorded_parts(handle.study), load_finetuned(handle.study)
    where = ""
    if "device" in parts:
        verb = "modelled" if baseline.latency.source == "modelled" else "measured"
        where = f"; latency {verb} for {parts['device']}, memory counted, loss measured on this machine"
    if closest:
        limits = parts.get("constraints")
        return front_table(closest, baseline, f"study {handle.name}: no configuration is within {limits}; the closest are{where}")
    trained = [tuned[point.trial].point(point) for point in front if point.trial in tuned]
    return front_table(front, baseline, f"front of study {handle.name}{where}", trained)


def front_words(document: Mapping[str, Any]) -> str:
    """The size of a front in a sentence, and how far it is from what the planner's tables imply.

    Args:
        document: Of `qsearch.report.documents.study_document`.
    """
    trials, bound = document["trials"], document["bound"]
    points, measured = len(document["front"]), trials["complete"] + trials["stopped_early"]
    words = (
        f"{points} of {measured} trials, hypervolume {document['hypervolume']:.4f} of the box below float's latency and memory "
        "and 10 pp of loss"
    )
    if bound is None or bound["share"] is None:
        return words
    return (
        f"{words}: {bound['share']:.1%} of the {bound['hypervolume']:.4f} that the planner's tables, corrected by "
        f"{bound['trials']} trials, predict"
    )


def front_table(front: Sequence[FrontPoint], baseline: Measurement, title: str, trained: Sequence[FrontPoint] = ()) -> Table:
    """The front of a study against float, fastest first.

    The columns of the second measurement are empty until there was one. Points that another one dominates by it are
    dropped: they come last, marked with the other's number. What fine-tuning made of a point stands below it.
    """
    numbers = ("latency ms", "again", "speed-up", "memory", f"{baseline.accuracy.metric} loss pp", "held-out pp")
    table = _table(title, ("trial",), numbers, ("layers", "calibration"))
    table.add_row(
        "float",
        _latency(baseline.latency),
        "",
        "1.00x",
        byte_text(baseline.memory.peak_bytes),
        f"({baseline.accuracy.top1:.2f} %)",
        "",
        "",
        "",
        style="dim",
        end_section=True,
    )
    kept = kept_points(front)
    for point in [*kept, *(point for point in front if point not in kept)]:
        # Below a point stands what was made of it.
        tuned = [(f"{point.trial} tuned", one) for one in trained if one.trial == point.trial]
        rows = [(str(point.trial), point), *tuned]
        for name, row in rows:
            last = bool(kept) and point is kept[-1] and row is rows[-1][1]
            table.add_row(
                name,
                *_figures(row, baseline),
                _layers(point.config),
                calibration_text(point.config),
                style=None if point in kept else "dim",
                end_section=last,
            )
    return table


def _figures(point: FrontPoint, baseline: Measurement) -> list[str]:
    """Latency, latency again, speed-up, memory, loss and held-out loss of a point."""
    measured = point.measurement
    return [
        _latency(measured.latency),
        "" if point.heldout is None else _latency(point.heldout.latency),
        f"{baseline.latency.median_ms / measured.latency.median_ms:.2f}x",
        byte_text(measured.memory.peak_bytes),
        _loss(measured.accuracy),
        _verdict(point),
    ]


def finetune_table(before: FrontPoint, after: FrontPoint, baseline: Measurement, title: str) -> Table:
    """A configuration before and after fine-tuning, against float.

    Args:
        before: As it was measured after training in float.
        after: As it was measured after fine-tuning.
        baseline: The float module.
        title: Of the table.
    """
    numbers = ("latency ms", "again", "speed-up", "memory", f"{baseline.accuracy.metric} loss pp", "held-out pp")
    table = _table(title, ("",), numbers)
    memory, top1 = byte_text(baseline.memory.peak_bytes), f"({baseline.accuracy.top1:.2f} %)"
    table.add_row("float", _latency(baseline.latency), "", "1.00x", memory, top1, "", style="dim", end_section=True)
    for name, point in (("not trained", before), ("fine-tuned", after)):
        table.add_row(name, *_figures(point, baseline))
    return table


def _table(title: str, left: Sequence[str], right: Sequence[str], last: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    for name in last:
        table.add_column(name)
    return table


def _latency(latency: Latency) -> str:
    return f"{latency.median_ms:.3f} ± {latency.spread_ms:.3f}"


def _loss(accuracy: Accuracy) -> str:
    half = (accuracy.top1_loss_ci_pp[1] - accuracy.top1_loss_ci_pp[0]) / 2
    return f"{accuracy.top1_loss_pp:+.2f} ± {half:.2f}"


def _verdict(point: FrontPoint) -> str:
    if point.heldout is None:
        return ""
    beaten = point.heldout.dominated_by
    return _loss(point.heldout.accuracy) + ("" if beaten is None else f" (dropped for {beaten})")


def _layers(config: QuantConfig) -> str:
    counts = Counter(config.precision.values())
    return " ".join(f"{counts[name]}·{name}" for name in sorted(counts))
