"""A picture of the planner's tables: what every layer costs and what it does to the outputs, at each precision.

Three panels over one another share the layers as columns, in the order of the network; a layer has a bar for each of
its precisions but the first, which the others are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from qsearch.report.pictures import COLOURS, FAINT, HEADER, INK, LEFT, MARGIN, OTHER_COLOUR, PAPER, TEXT, TITLE, byte_text

__all__ = ["draw_tables"]

HEIGHT = 150
HEADING = 30
BAR = 9
GAP = 5
NARROWEST = 18
# Decades below the largest divergence that are told apart; what is smaller matters to nobody.
DECADES = 5
TICKS = 4


@dataclass(frozen=True)
class _Axis:
    """A panel's vertical axis.

    Attributes:
        place: Value -> share of the height, 0 at the bottom.
        ticks: Values with what is written beside them.
        base: Where bars begin, as a value.
    """

    place: Callable[[float], float]
    ticks: tuple[tuple[float, str], ...]
    base: float


@dataclass(frozen=True)
class _Panel:
    """One measure of the tables."""

    heading: str
    values: Mapping[tuple[str, str], float]
    axis: _Axis


def draw_tables(rows: Sequence[Mapping[str, Any]], title: str) -> Image.Image:
    """Draw the tables.

    Args:
        rows: Of `qsearch.search.tables.layer_tables.layer_rows`, at least one.
        title: The picture's heading.

    Returns:
        An RGB image as wide as the network is deep.
    """
    layers = list(dict.fromkeys(str(row["layer"]) for row in sorted(rows, key=lambda row: row["position"])))
    found = {str(row["precision"]) for row in rows}
    precisions = [name for name in COLOURS if name in found] + sorted(found - set(COLOURS))
    panels = _panels(rows)
    text, heading = ImageFont.load_default(TEXT), ImageFont.load_default(TITLE)
    column = max(NARROWEST, len(precisions) * BAR + GAP)
    names = max(math.ceil(text.getlength(name)) for name in layers)
    words = [heading.getlength(title), *(text.getlength(panel.heading) for panel in panels)]
    width = LEFT + max(len(layers) * column, math.ceil(max(words))) + MARGIN
    image = Image.new("RGB", (width, HEADER + len(panels) * (HEADING + HEIGHT) + names + 2 * MARGIN), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((LEFT, MARGIN), title, fill=INK, font=heading)
    _draw_legend(draw, precisions)
    for index, panel in enumerate(panels):
        top = HEADER + index * (HEADING + HEIGHT)
        draw.text((LEFT, top + 6), panel.heading, fill=INK, font=text)
        _draw_panel(draw, panel, (layers, precisions, column), top + HEADING)
    _draw_names(image, layers, column, HEADER + len(panels) * (HEADING + HEIGHT) + 6)
    return image


def _panels(rows: Sequence[Mapping[str, Any]]) -> list[_Panel]:
    """The three measures with their axes."""

    def of(measure: str, factor: float) -> dict[tuple[str, str], float]:
        return {(str(row["layer"]), str(row["precision"])): factor * float(row[measure]) for row in rows}

    nats, microseconds, held = of("divergence", 1.0), of("latency_ms", 1e3), of("weight_bytes", 1.0)
    return [
        _Panel("divergence of the outputs from float's, nats (logarithmic)", nats, _log_axis(list(nats.values()))),
        _Panel(
            "latency against the layer's first precision, us",
            microseconds,
            _linear_axis(list(microseconds.values()), lambda value: f"{value:+.4g}" if value else "0"),
        ),
        _Panel("weights against the layer's first precision", held, _linear_axis(list(held.values()), _signed_bytes)),
    ]


def _draw_legend(draw: ImageDraw.ImageDraw, precisions: Sequence[str]) -> None:
    left, top, font = LEFT, MARGIN + 24, ImageFont.load_default(TEXT)
    for precision in precisions:
        draw.rectangle((left, top + 1, left + 12, top + 13), fill=COLOURS.get(precision, OTHER_COLOUR))
        draw.text((left + 18, top), precision, fill=INK, font=font)
        left += 36 + math.ceil(font.getlength(precision))


def _draw_panel(draw: ImageDraw.ImageDraw, panel: _Panel, columns: tuple[list[str], list[str], int], top: int) -> None:
    layers, precisions, column = columns
    axis, font = panel.axis, ImageFont.load_default(TEXT)

    def height(value: float) -> int:
        return top + HEIGHT - round(min(max(axis.place(value), 0.0), 1.0) * HEIGHT)

    for value, words in axis.ticks:
        draw.line((LEFT - 4, height(value), LEFT + len(layers) * column, height(value)), fill=FAINT)
        draw.text((LEFT - 8, height(value)), words, fill=INK, font=font, anchor="rm")
    for index, layer in enumerate(layers):
        shown = [name for name in precisions if (layer, name) in panel.values]
        for place, precision in enumerate(shown):
            left = LEFT + index * column + (column - len(shown) * BAR) // 2 + place * BAR
            low, high = sorted((height(axis.base), height(panel.values[layer, precision])))
            # The smallest value still shows as a line.
            draw.rectangle((left, low, left + BAR - 2, max(high, low + 1)), fill=COLOURS.get(precision, OTHER_COLOUR))


def _draw_names(image: Image.Image, layers: Sequence[str], column: int, top: int) -> None:
    font = ImageFont.load_default(TEXT)
    for index, name in enumerate(layers):
        # Pillow writes horizontally only: the name is drawn on a slip of paper, which is then turned.
        slip = Image.new("RGB", (math.ceil(font.getlength(name)) + 2, NARROWEST - 2), PAPER)
        ImageDraw.Draw(slip).text((0, 0), name, fill=INK, font=font)
        image.paste(slip.rotate(90, expand=True), (LEFT + index * column + (column - slip.height) // 2, top))


def _log_axis(values: Sequence[float]) -> _Axis:
    """A few decades up to the largest value."""
    top = math.ceil(math.log10(max(max(values), 1e-12)))
    low = top - DECADES
    positive = [value for value in values if value > 0]
    if positive:
        low = max(low, min(top - 1, math.floor(math.log10(min(positive)))))
    ticks = tuple((10.0**decade, f"1e{decade}") for decade in range(low, top + 1))
    return _Axis(lambda value: (math.log10(max(value, 10.0**low)) - low) / (top - low), ticks, 10.0**low)


def _linear_axis(values: Sequence[float], words: Callable[[float], str]) -> _Axis:
    """From the least to the largest value, zero included, with round ticks."""
    low, high = min(0.0, *values), max(0.0, *values)
    if high == low:
        high = low + 1.0
    rough = (high - low) / TICKS
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(digit * magnitude for digit in (1.0, 2.0, 5.0, 10.0) if digit * magnitude >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = tuple((index * step, words(index * step)) for index in range(first, last + 1))
    return _Axis(lambda value: (value - low) / (high - low), ticks, 0.0)


def _signed_bytes(value: float) -> str:
    return ("-" if value < 0 else "") + byte_text(abs(value))
