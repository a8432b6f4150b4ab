"""Trials per hour by number of workers, as a picture: a line for each number of devices, a panel for each workload."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from curves_plot import COLOURS, GRID, INK, PAPER
from PIL import Image, ImageDraw, ImageFont

__all__ = ["draw_scale"]

WIDTH, HEIGHT, TOP, BOTTOM, LEFT, GAP = 460, 360, 76, 46, 70, 24


@dataclass(frozen=True)
class Panel:
    """A diagram of two logarithmic axes: where it lies, and what its ends are."""

    left: int
    across: tuple[float, float]
    up: tuple[float, float]

    def point(self, x: float, y: float) -> tuple[float, float]:
        """Pixel of a point."""
        return self.left + WIDTH * _share(x, self.across), TOP + HEIGHT * (1 - _share(y, self.up))


def _share(value: float, ends: tuple[float, float]) -> float:
    low, high = map(math.log10, ends)
    return (math.log10(value) - low) / max(high - low, 1e-9)


def draw_scale(report: Mapping[str, Any], workloads: Sequence[str]) -> Image.Image:
    """Draw what `simulation.py` reports.

    Args:
        report: The report.
        workloads: Which of its workloads.

    Returns:
        An RGB image.
    """
    image = Image.new("RGB", (len(workloads) * (LEFT + WIDTH + GAP), TOP + HEIGHT + BOTTOM), PAPER)
    draw = ImageDraw.Draw(image)
    heading = f"trials per hour, simulated from measured service times; storage: {report['storage']}"
    draw.text((LEFT, 8), heading, fill=INK, font=ImageFont.load_default(16))
    rows = [row for workload in workloads for row in report[workload]["rows"]]
    devices = sorted({row["devices"] for row in rows})
    rates = [row["trials_per_hour"] for row in rows]
    ends = 10.0 ** math.floor(math.log10(min(rates))), 10.0 ** math.ceil(math.log10(max(rates)))
    across = float(min(row["workers"] for row in rows)), float(max(row["workers"] for row in rows))
    for index, workload in enumerate(workloads):
        panel = Panel(LEFT + index * (LEFT + WIDTH + GAP), across, ends)
        _axes(draw, panel, f"workers; workload: {workload}")
        for line, count in enumerate(devices):
            colour = COLOURS[line % len(COLOURS)]
            own = sorted((one["workers"], one["trials_per_hour"]) for one in report[workload]["rows"] if one["devices"] == count)
            points = [panel.point(float(workers), rate) for workers, rate in own]
            if len(points) > 1:
                draw.line(points, fill=colour, width=2)
            for x, y in points:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
    for line, count in enumerate(devices):
        left, colour = LEFT + line * 130, COLOURS[line % len(COLOURS)]
        draw.line((left, 46, left + 22, 46), fill=colour, width=3)
        draw.text((left + 28, 46), f"{count} device{'s' if count > 1 else ''}", fill=INK, font=_font(), anchor="lm")
    return image


def _font() -> Any:
    return ImageFont.load_default(12)


def _axes(draw: ImageDraw.ImageDraw, panel: Panel, label: str) -> None:
    for mark in _marks(panel.up, (1,)):
        start, y = panel.point(panel.across[0], mark)
        draw.line((start, y, start + WIDTH, y), fill=GRID)
        draw.text((start - 6, y), f"{mark:,.0f}", fill=INK, font=_font(), anchor="rm")
    for mark in _marks(panel.across, (1, 2, 5)):
        x, y = panel.point(mark, panel.up[0])
        draw.line((x, TOP, x, y), fill=GRID)
        draw.text((x, y + 6), f"{mark:g}", fill=INK, font=_font(), anchor="mt")
    draw.text((panel.left + WIDTH / 2, TOP + HEIGHT + 24), label, fill=INK, font=_font(), anchor="mt")


def _marks(ends: tuple[float, float], digits: Sequence[int]) -> list[float]:
    decades = range(math.floor(math.log10(ends[0])), math.ceil(math.log10(ends[1])) + 1)
    return [mark for decade in decades for digit in digits if ends[0] <= (mark := digit * 10.0**decade) <= ends[1] * 1.001]
