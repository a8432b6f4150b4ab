"""Tables for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from qsearch.config import QuantConfig
from qsearch.measure.measurement import Accuracy, Measurement
from qsearch.report.notes import calibration_text
from qsearch.report.pictures import byte_text
from qsearch.search.front import FrontPoint

__all__ = ["EvaluateRow", "evaluate_table", "front_table"]


@dataclass(frozen=True)
class EvaluateRow:
    """One line of the evaluate table.

    Attributes:
        precision: 'fp32', 'int8' or the name of a configuration file.
        latency_ms: Median, milliseconds.
        peak_bytes: Weights, activations and workspace.
        speedup: Float's latency over this one's.
        top1: Percent.
        top5: Percent.
        images: Number of images.
    """

    precision: str
    latency_ms: float
    peak_bytes: int
    speedup: float
    top1: float
    top5: float
    images: int


def evaluate_table(rows: Sequence[EvaluateRow], title: str) -> Table:
    """The plain comparison of precisions."""
    table = _table(title, ("precision",), ("latency ms", "memory", "speed-up", "top-1 %", "top-5 %"))
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


def front_table(front: Sequence[FrontPoint], baseline: Measurement, title: str) -> Table:
    """The front of a study against float, fastest first.

    The held-out column is empty until a point was measured again; a point that another one beats by that second
    measurement is marked with the other's number.
    """
    numbers = ("latency ms", "speed-up", "memory", "top-1 loss pp", "held-out pp")
    table = _table(title, ("trial",), numbers, ("layers", "calibration"))
    table.add_row(
        "float",
        _latency(baseline),
        "1.00x",
        byte_text(baseline.memory.peak_bytes),
        f"({baseline.accuracy.top1:.2f} %)",
        "",
        "",
        "",
        style="dim",
        end_section=True,
    )
    for point in front:
        measured = point.measurement
        table.add_row(
            str(point.trial),
            _latency(measured),
            f"{baseline.latency.median_ms / measured.latency.median_ms:.2f}x",
            byte_text(measured.memory.peak_bytes),
            _loss(measured.accuracy),
            _verdict(point),
            _layers(point.config),
            calibration_text(point.config),
        )
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


def _latency(measurement: Measurement) -> str:
    return f"{measurement.latency.median_ms:.3f} ± {measurement.latency.spread_ms:.3f}"


def _loss(accuracy: Accuracy) -> str:
    half = (accuracy.top1_loss_ci_pp[1] - accuracy.top1_loss_ci_pp[0]) / 2
    return f"{accuracy.top1_loss_pp:+.2f} ± {half:.2f}"


def _verdict(point: FrontPoint) -> str:
    if point.heldout is None:
        return ""
    beaten = point.heldout.dominated_by
    return _loss(point.heldout.accuracy) + ("" if beaten is None else f" (<{beaten})")


def _layers(config: QuantConfig) -> str:
    counts = Counter(config.precision.values())
    return " ".join(f"{counts[name]}·{name}" for name in sorted(counts))
