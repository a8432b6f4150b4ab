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

__all__ = [
    "NOTHING_BEATS_FLOAT",
    "EvaluateRow",
    "evaluate_table",
    "finetune_table",
    "front_table",
    "front_words",
    "hidden_speedups",
    "plain_table",
    "study_table",
]

NOTHING_BEATS_FLOAT = "nothing that was tried beats float in any objective: `export` picks float"
# A single image hides what a precision gains where so much of its time does not grow with the batch, and where its speed-up
# is so much less than in the largest batch.
FIXED, HIDDEN = 0.3, 0.8


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
        batch: Images of one inference.
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
    batch: int = 1

    @property
    def images_per_s(self) -> float:
        """Throughput of inferences one after the other."""
        return 1e3 * self.batch / self.latency_ms


def evaluate_table(rows: Sequence[EvaluateRow], title: str) -> Table:
    """The plain comparison of precisions, batch by batch where there are larger ones than 1."""
    scores = (f"{rows[0].metric} %", f"{rows[0].second_metric} %")
    batches = any(row.batch != 1 for row in rows)
    table = plain_table(
        title,
        ("precision",),
        (*(("batch",) if batches else ()), "latency ms", *(("images/s",) if batches else ()), "memory", "speed-up", *scores),
    )
    for row in rows:
        table.add_row(
            row.precision,
            *((str(row.batch),) if batches else ()),
            f"{row.latency_ms:.3f}",
            *((f"{row.images_per_s:.0f}",) if batches else ()),
            byte_text(row.peak_bytes),
            f"{row.speedup:.2f}x",
            f"{row.top1:.2f}",
            f"{row.top5:.2f}",
        )
    return table


def hidden_speedups(rows: Sequence[EvaluateRow]) -> list[str]:
    """What a single image hides of the precisions' speed, a sentence each.

    A module's time is taken for a fixed part, such as calls and launches, and one that grows with the batch; both follow
    from its times at batch 1 and in the largest.
    """
    found = []
    for name in dict.fromkeys(row.precision for row in rows):
        own = {row.batch: row for row in rows if row.precision == name}
        one, most = own.get(1), own[max(own)]
        if one is None or most.batch == 1:
            continue
        fixed = (most.batch - most.latency_ms / one.latency_ms) / (most.batch - 1)
        if fixed >= FIXED and one.speedup <= HIDDEN * most.speedup:
            found.append(
                f"{name}: {100 * fixed:.0f} % of its time at batch 1 does not grow with the batch (calls, launches); it is "
                f"{one.speedup:.2f} times as fast as float there, {most.speedup:.2f} times at batch {most.batch}"
            )
    return found


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
    table = plain_table(title, ("trial",), numbers, ("layers", "calibration"))
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
    table = plain_table(title, ("",), numbers)
    memory, top1 = byte_text(baseline.memory.peak_bytes), f"({baseline.accuracy.top1:.2f} %)"
    table.add_row("float", _latency(baseline.latency), "", "1.00x", memory, top1, "", style="dim", end_section=True)
    for name, point in (("not trained", before), ("fine-tuned", after)):
        table.add_row(name, *_figures(point, baseline))
    return table


def plain_table(title: str, left: Sequence[str], right: Sequence[str] = (), last: Sequence[str] = ()) -> Table:
    """An empty table.

    Args:
        title: Its heading.
        left: Names of its first columns.
        right: Of those with numbers after them.
        last: Of the last ones.
    """
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
