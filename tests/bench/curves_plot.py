"""Curves of hypervolume as a picture: by trials on the left, by seconds on the right."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from verdicts import Curves

__all__ = ["draw_curves"]

# Okabe and Ito's palette: told apart with every kind of colour vision. The planner comes first.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000")
INK, GRID, PAPER = "#222222", "#DDDDDD", "#FFFFFF"
WIDTH, HEIGHT, TOP, BOTTOM, LEFT, GAP = 520, 400, 60, 46, 58, 70
# The lowest percent shown is the least that any curve has after this many trials.
FIRST = 10
LEGEND_STEP = 150


@dataclass(frozen=True)
class Panel:
    """One of the two diagrams.

    Attributes:
        left: Its left edge, pixels.
        low: Percent at its lower edge; 100 is at the upper one.
        span: Least and greatest abscissa.
        logarithmic: Whether the abscissa is.
    """

    left: int
    low: float
    span: tuple[float, float]
    logarithmic: bool = False

    def point(self, x: float, percent: float) -> tuple[float, float]:
        """Pixel of a point."""
        low, high, value = (math.log(max(v, 1e-9)) if self.logarithmic else v for v in (*self.span, x))
        share = (value - low) / max(high - low, 1e-9)
        return self.left + WIDTH * share, TOP + HEIGHT * (100.0 - percent) / (100.0 - self.low)


def draw_curves(curves: Mapping[str, Curves], document: Mapping[str, Any]) -> Image.Image:
    """Draw the mean over seeds of every sampler.

    Args:
        curves: Sampler -> its curves.
        document: What was found of them; its problem, seeds and reference make the heading.

    Returns:
        An RGB image.
    """
    image = Image.new("RGB", (2 * (LEFT + WIDTH) + GAP, TOP + HEIGHT + BOTTOM), PAPER)
    draw = ImageDraw.Draw(image)
    known = document["reference"]["configurations"]
    heading = f"{document['problem']}: hypervolume, percent of {known} measured configurations; {document['seeds']} seeds"
    draw.text((LEFT, 8), heading, fill=INK, font=ImageFont.load_default(16))
    low = math.floor(min(float(one.percent.mean(axis=0)[min(FIRST, one.percent.shape[1]) - 1]) for one in curves.values()))
    low = max(0, min(low, 99) // 5 * 5)
    trials = max(one.percent.shape[1] for one in curves.values())
    ends = [one.seconds[:, -1].mean() for one in curves.values()]
    starts = [one.seconds[:, 0].mean() for one in curves.values()]
    by_trial = Panel(LEFT, low, (1, trials))
    by_time = Panel(2 * LEFT + WIDTH + GAP // 2, low, (min(starts), max(ends)), logarithmic=True)
    _axes(draw, by_trial, _round_steps(trials), "trials")
    _axes(draw, by_time, _decades(*by_time.span), "seconds, tables included")
    for index, (sampler, found) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        left = LEFT + index * LEGEND_STEP
        draw.line((left, 42, left + 22, 42), fill=colour, width=3)
        draw.text((left + 28, 42), sampler, fill=INK, font=ImageFont.load_default(13), anchor="lm")
        count = found.percent.shape[1]
        _line(draw, by_trial, np.arange(1, count + 1), found.percent.mean(axis=0), colour)
        moments = np.geomspace(found.seconds[:, 0].mean(), found.seconds[:, -1].mean(), WIDTH)
        _line(draw, by_time, moments, np.array([found.at_time(moment).mean() for moment in moments]), colour)
    return image


def _line(draw: ImageDraw.ImageDraw, panel: Panel, x: np.ndarray, percent: np.ndarray, colour: str) -> None:
    points = [panel.point(float(a), float(b)) for a, b in zip(x, percent, strict=True) if b >= panel.low]
    if len(points) > 1:
        draw.line(points, fill=colour, width=2)


def _axes(draw: ImageDraw.ImageDraw, panel: Panel, marks: list[float], label: str) -> None:
    font = ImageFont.load_default(12)
    for percent in np.linspace(panel.low, 100, 6):
        start, y = panel.point(panel.span[0], percent)
        draw.line((start, y, start + WIDTH, y), fill=GRID)
        draw.text((start - 6, y), f"{percent:g}", fill=INK, font=font, anchor="rm")
    for mark in marks:
        x, y = panel.point(mark, panel.low)
        draw.line((x, TOP, x, y), fill=GRID)
        draw.text((x, y + 6), f"{mark:g}", fill=INK, font=font, anchor="mt")
    draw.text((panel.left + WIDTH / 2, TOP + HEIGHT + 24), label, fill=INK, font=font, anchor="mt")


def _round_steps(most: int) -> list[float]:
    """About four marks at round numbers."""
    step = max(1, round(most / 4))
    return [float(mark) for mark in range(step, most + 1, step)]


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within a range."""
    exponents = range(math.floor(math.log10(max(low, 1e-3))), math.ceil(math.log10(high)) + 1)
    marks = [float(f"{digit}e{exponent}") for exponent in exponents for digit in (1, 2, 5)]
    return [mark for mark in marks if low <= mark <= high]
