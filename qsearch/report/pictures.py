"""A picture of the per-layer precisions of one configuration.

One column per layer in the order of the network: a coloured strip for the precision, above it a bar for the
bytes of its weights (logarithmic), below it the layer's name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qsearch.config import QuantConfig
from qsearch.models.graph import Graph
from qsearch.qtype import PRECISIONS
from qsearch.search.anchors import weight_count

__all__ = ["LayerBar", "byte_text", "draw_precisions", "layer_bars"]

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Okabe and Ito's palette: told apart with every kind of colour vision. Narrow types are warm, wide ones cold.
COLOURS = {
    "fp32": "#0072B2",
    "tf32": "#CC79A7",
    "fp16": "#009E73",
    "int16": "#56B4E9",
    "int8": "#E69F00",
    "fp8": "#F0E442",
    "w4a8": "#D55E00",
}
OTHER_COLOUR = "#999999"
INK, FAINT, PAPER = "#222222", "#DDDDDD", "#FFFFFF"

COLUMN = 20
GAP = 3
BARS = 170
STRIP = 18
LEFT = 76
MARGIN = 14
HEADER = 62
TEXT = 13
TITLE = 16


@dataclass(frozen=True)
class LayerBar:
    """One column of the picture.

    Attributes:
        name: The layer's name.
        precision: Its precision.
        weight_bytes: Bytes of its weights in that precision.
    """

    name: str
    precision: str
    weight_bytes: int


def layer_bars(graph: Graph, config: QuantConfig) -> list[LayerBar]:
    """The columns of a configuration, in the order of the graph."""
    precision = {name: one.precision for name, one in config.resolve(graph.layer_types).items()}
    return [
        LayerBar(node.name, precision[node.name], math.ceil(weight_count(graph, node) * _weight_bits(precision[node.name]) / 8))
        for node in graph.layers
    ]


def draw_precisions(bars: Sequence[LayerBar], title: str) -> Image.Image:
    """Draw the picture.

    Args:
        bars: One column per layer, at least one.
        title: Its heading.

    Returns:
        An RGB image as wide as the network is deep.
    """
    text, heading = ImageFont.load_default(TEXT), ImageFont.load_default(TITLE)
    names = max(math.ceil(text.getlength(bar.name)) for bar in bars)
    legend = _legend(bars)
    legend_width = sum(36 + math.ceil(text.getlength(entry)) for _, entry in legend)
    width = LEFT + max(len(bars) * COLUMN, legend_width, math.ceil(heading.getlength(title))) + MARGIN
    image = Image.new("RGB", (width, HEADER + BARS + STRIP + names + 2 * MARGIN), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((LEFT, MARGIN), title, fill=INK, font=heading)
    _draw_legend(draw, legend, text)
    low, high = _decades(bars)
    _draw_scale(draw, low, high, (LEFT + len(bars) * COLUMN, text))
    for index, bar in enumerate(bars):
        _draw_column(image, bar, LEFT + index * COLUMN, (low, high))
    return image


def _draw_column(image: Image.Image, bar: LayerBar, left: int, decades: tuple[int, int]) -> None:
    draw, colour = ImageDraw.Draw(image), COLOURS.get(bar.precision, OTHER_COLOUR)
    right, floor = left + COLUMN - GAP, HEADER + BARS
    draw.rectangle((left, _height(bar.weight_bytes, decades), right - 1, floor - 1), fill=colour)
    draw.rectangle((left, floor + 3, right - 1, floor + STRIP), fill=colour)
    image.paste(_upright(bar.name), (left, floor + STRIP + 6))


@cache
def _upright(name: str) -> Image.Image:
    """A layer's name, written upwards; the same in every picture of a study."""
    font = ImageFont.load_default(TEXT)
    # Pillow writes horizontally only: the name is drawn on a slip of paper, which is then turned.
    slip = Image.new("RGB", (math.ceil(font.getlength(name)) + 2, COLUMN - 2), PAPER)
    ImageDraw.Draw(slip).text((0, 0), name, fill=INK, font=font)
    return slip.rotate(90, expand=True)


def _legend(bars: Sequence[LayerBar]) -> list[tuple[str, str]]:
    """Precision and the text beside its colour: how many layers, how many bytes."""
    order = [*COLOURS, *sorted({bar.precision for bar in bars} - set(COLOURS))]
    entries = []
    for precision in order:
        of = [bar for bar in bars if bar.precision == precision]
        if of:
            layers = "layer" if len(of) == 1 else "layers"
            entries.append((precision, f"{precision}: {len(of)} {layers}, {byte_text(sum(bar.weight_bytes for bar in of))}"))
    return entries


def _draw_legend(draw: ImageDraw.ImageDraw, legend: list[tuple[str, str]], font: Font) -> None:
    left, top = LEFT, MARGIN + 24
    for precision, entry in legend:
        draw.rectangle((left, top + 1, left + 12, top + 13), fill=COLOURS.get(precision, OTHER_COLOUR))
        draw.text((left + 18, top), entry, fill=INK, font=font)
        left += 36 + math.ceil(font.getlength(entry))


def _draw_scale(draw: ImageDraw.ImageDraw, low: int, high: int, edge: tuple[int, Font]) -> None:
    right, font = edge
    for decade in range(low, high + 1):
        y = _height(10**decade, (low, high))
        draw.line((LEFT - 4, y, right, y), fill=FAINT)
        draw.text((LEFT - 8, y), byte_text(10**decade), fill=INK, font=font, anchor="rm")


def _decades(bars: Sequence[LayerBar]) -> tuple[int, int]:
    sizes = [max(1, bar.weight_bytes) for bar in bars]
    low, high = math.floor(math.log10(min(sizes))), math.ceil(math.log10(max(sizes)))
    return low, max(high, low + 1)


def _height(size: int, decades: tuple[int, int]) -> int:
    low, high = decades
    share = (math.log10(max(1, size)) - low) / (high - low)
    # The smallest layer still shows as a sliver.
    return HEADER + BARS - max(2, round(share * (BARS - 10)))


def byte_text(size: float) -> str:
    """Bytes with a decimal unit and three digits: 640 B, 12.8 kB, 4.10 MB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 or size == int(size) else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def _weight_bits(precision: str) -> int:
    weight = PRECISIONS[precision].weight
    return (weight.qmax - weight.qmin).bit_length() if PRECISIONS[precision].is_integer else 8 * np.dtype(weight.dtype).itemsize
