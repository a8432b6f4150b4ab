"""Pictures of a study's figures: the front in two projections, its precisions, its second measurement, its history.

What the report page draws for a screen, drawn once for a file or a notebook.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from qsearch.report.pictures import COLOURS, FAINT, INK, OTHER_COLOUR, PAPER, byte_text

__all__ = ["beside", "draw_front", "draw_heldout", "draw_history", "draw_map"]

Document = Mapping[str, Any]
Ends = tuple[float, float]

# Twice as large as on a screen, so that prints and dense screens show it sharp.
TEXT, TITLE = 22, 28
WIDTH, HEIGHT = 1240, 800
LEFT, RIGHT, TOP, BOTTOM = 120, 40, 110, 110
ACCENT, MARK, PLAIN, MUTED = "#0072B2", "#D55E00", "#B4BAC3", "#5D636C"
DOT, ROW, CELL, LONGEST_NAME = 11, 46, 34, 40


@dataclass(frozen=True)
class _Axis:
    """One axis of a chart.

    Attributes:
        title: What it shows.
        ends: The values at its ends.
        words: (value, decimals) -> what is written beside a tick.
    """

    title: str
    ends: Ends
    words: Callable[[float, int], str]

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """Round values with their words."""
        low, high = self.ends
        rough = (high - low) / most
        magnitude = 10.0 ** math.floor(math.log10(rough))
        step = next(digit * magnitude for digit in (1.0, 2.0, 5.0, 10.0) if digit * magnitude >= rough * (1 - 1e-9))
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return [(index * step, self.words(index * step, decimals)) for index in range(first, last + 1)]

    def place(self, value: float, start: float, end: float) -> float:
        """Where a value lies between two pixels."""
        low, high = self.ends
        return start + (value - low) / (high - low) * (end - start)


def draw_front(document: Document, measure: str) -> Image.Image:
    """Draw the front of a study in one projection.

    Args:
        document: Of `qsearch.report.page_document.page_document`, with at least one point.
        measure: latency_ms or peak_bytes: what is drawn against loss.

    Returns:
        An RGB image.
    """
    base, points, most = document["study"]["baseline"], document["points"], document["loss_bound_pp"]
    shown = [*points, *([base | {"top1_loss_pp": 0.0}] if base else [])]
    by_bytes = measure == "peak_bytes"
    across = _Axis(
        "memory" if by_bytes else "latency, ms",
        _ends([point[measure] for point in shown], 0.07),
        (lambda value, _: byte_text(value)) if by_bytes else _plain,
    )
    # What loses more than anyone wants is drawn at the upper edge: it would press all others flat.
    up = _Axis(
        f"{document['metric']} loss, percentage points",
        _ends([min(point["top1_loss_pp"], most) for point in shown], 0.12),
        _signed,
    )
    title = f"{_clean(document['study']['study'])}: {'memory' if by_bytes else 'latency'} against loss"
    image, draw = _paper(WIDTH, HEIGHT, title)
    x, y = _frame(draw, across, up)
    for other in document["others"]:
        if _within(across.ends, other[measure]) and _within(up.ends, other["top1_loss_pp"]):
            _dot(draw, x(other[measure]), y(other["top1_loss_pp"]), 5, PLAIN)
    if base:
        left, top = x(base[measure]), y(0.0)
        draw.polygon([(left, top - 14), (left + 14, top), (left, top + 14), (left - 14, top)], fill=INK)
        draw.text((left - 20, top), "float", fill=MUTED, font=_font(TEXT), anchor="rm", stroke_width=4, stroke_fill=PAPER)
    taken: list[tuple[float, float, float, float]] = []
    for point in points:
        left, top = x(point[measure]), y(min(point["top1_loss_pp"], most))
        colour = MARK if point["kind"] == "closest" else ACCENT
        if point["top1_loss_pp"] > most:
            draw.polygon([(left, top - 13), (left + 13, top + 10), (left - 13, top + 10)], fill=colour)
        else:
            _dot(draw, left, top, DOT, colour, hollow=point["kind"] == "dropped")
        taken.append((left - DOT, top - DOT, left + DOT, top + DOT))
    for point in points:
        _label(draw, (x(point[measure]), y(min(point["top1_loss_pp"], most))), str(point["trial"]), taken)
    return image


def draw_history(document: Document) -> Image.Image:
    """Draw the hypervolume after each trial, and what the planner's tables predict.

    Args:
        document: Of `page_document`, with at least one measured trial.
    """
    steps, bound = document["history"], document["study"]["bound"]
    volumes = [step["hypervolume"] for step in steps if step["hypervolume"] > 0]
    values = [*volumes, *([bound["hypervolume"]] if bound else []), *([] if volumes else [0.0, 1.0])]
    across = _Axis("trials", (0.0, float(len(steps))), lambda value, decimals: "" if decimals else f"{value:.0f}")
    up = _Axis("hypervolume", _ends(values, 0.12), _plain)
    image, draw = _paper(WIDTH, HEIGHT, f"{_clean(document['study']['study'])}: the front, trial by trial")
    x, y = _frame(draw, across, up)
    if bound:
        top = y(bound["hypervolume"])
        for left in range(LEFT, WIDTH - RIGHT, 22):
            draw.line((left, top, min(left + 12, WIDTH - RIGHT), top), fill=MARK, width=3)
        draw.text((WIDTH - RIGHT, top - 8), "what the planner's tables predict", fill=MUTED, font=_font(TEXT), anchor="rb")
    before: tuple[float, float] | None = None
    for index, step in enumerate(steps, 1):
        if step["fate"] != "measured":
            colour = PLAIN if step["fate"] == "stopped early" else MARK
            draw.line((x(index), HEIGHT - BOTTOM - 18, x(index), HEIGHT - BOTTOM), fill=colour, width=3)
        if step["hypervolume"] <= 0:
            continue
        here = (x(index), y(step["hypervolume"]))
        if before is not None:
            draw.line([before, (here[0], before[1]), here], fill=ACCENT, width=4)
        if before is None or here[1] < before[1]:
            _dot(draw, *here, 7, ACCENT)
        before = here
    return image


def draw_heldout(document: Document) -> Image.Image:
    """Draw the loss of each front member, in the search and on held-out images, with their intervals.

    Args:
        document: Of `page_document`, with at least one point that was measured again.
    """
    again = [point for point in document["points"] if point["heldout"]]
    ends = [end for point in again for end in (*point["top1_loss_ci_pp"], *point["heldout"]["top1_loss_ci_pp"])]
    across = _Axis(f"{document['metric']} loss, percentage points, with 95 % intervals", _ends([0.0, *ends], 0.05), _signed)
    height = TOP + len(again) * ROW + BOTTOM
    title = f"{_clean(document['study']['study'])}: loss in the search (grey) and on held-out images (blue)"
    image, draw = _paper(WIDTH, height, title)
    font = _font(TEXT)

    def x(value: float) -> float:
        return across.place(value, LEFT + 20, WIDTH - RIGHT)

    for value, words in across.ticks(8):
        draw.line((x(value), TOP, x(value), height - BOTTOM), fill=INK if value == 0 else FAINT, width=2)
        draw.text((x(value), height - BOTTOM + 10), words, fill=MUTED, font=font, anchor="ma")
    draw.text(((LEFT + WIDTH) / 2, height - 20), across.title, fill=MUTED, font=font, anchor="mb")
    for index, point in enumerate(again):
        middle = TOP + index * ROW + ROW / 2
        draw.text((LEFT, middle), point["name"], fill=INK, font=font, anchor="rm")
        for source, top, colour in ((point, middle - 8, PLAIN), (point["heldout"], middle + 8, ACCENT)):
            low, high = source["top1_loss_ci_pp"]
            draw.line((x(low), top, x(high), top), fill=colour, width=4)
            _dot(draw, x(source["top1_loss_pp"]), top, 7, colour)
    return image


def draw_map(document: Document) -> Image.Image:
    """Draw the precision of every layer of every point: a row per point, a column per layer in the order of the network.

    Args:
        document: Of `page_document`, with at least one point.
    """
    points, layers, font = document["points"], document["layers"], _font(TEXT)
    names = [_clean(layer["name"]) for layer in layers]
    # Names of layers are told apart by their ends.
    names = [name if len(name) <= LONGEST_NAME else f"{name[:12]}...{name[15 - LONGEST_NAME :]}" for name in names]
    used = {precision for point in points for precision in point["precisions"]}
    entries = [name for name in COLOURS if name in used] + sorted(used - set(COLOURS))
    title = f"{_clean(document['study']['study'])}: precision of every layer"
    legend = sum(60 + math.ceil(font.getlength(name)) for name in entries)
    width = LEFT + max(len(layers) * CELL, math.ceil(_font(TITLE).getlength(title)), legend) + RIGHT
    below = TOP + len(points) * CELL + 12
    longest = max((math.ceil(font.getlength(name)) for name in names), default=0)
    image, draw = _paper(width, below + longest + 30, title)
    left = LEFT
    for name in entries:
        draw.rectangle((left, 64, left + 22, 86), fill=COLOURS.get(name, OTHER_COLOUR))
        draw.text((left + 32, 75), name, fill=INK, font=font, anchor="lm")
        left += 60 + math.ceil(font.getlength(name))
    for row, point in enumerate(points):
        top = TOP + row * CELL
        draw.text((LEFT - 12, top + CELL / 2), str(point["trial"]), fill=INK, font=font, anchor="rm")
        for column, precision in enumerate(point["precisions"]):
            place = (LEFT + column * CELL, top, LEFT + (column + 1) * CELL - 4, top + CELL - 4)
            draw.rectangle(place, fill=COLOURS.get(precision, OTHER_COLOUR))
    for column, name in enumerate(names):
        # Pillow writes horizontally only: the name is drawn on a slip of paper, which is then turned.
        slip = Image.new("RGB", (longest + 2, CELL - 2), PAPER)
        ImageDraw.Draw(slip).text((longest, CELL / 2 - 2), name, fill=INK, font=font, anchor="rm")
        image.paste(slip.rotate(90, expand=True), (LEFT + column * CELL, below))
    return image


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures beside each other on one paper."""
    image = Image.new("RGB", (sum(one.width for one in pictures), max(one.height for one in pictures)), PAPER)
    left = 0
    for one in pictures:
        image.paste(one, (left, 0))
        left += one.width
    return image


def _paper(width: int, height: int, title: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    width = max(width, LEFT + math.ceil(_font(TITLE).getlength(title)) + RIGHT)
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((LEFT, 16), title, fill=INK, font=_font(TITLE))
    return image, draw


def _frame(draw: ImageDraw.ImageDraw, across: _Axis, up: _Axis) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """Draw the axes of a chart; returns where values lie on each."""
    right, floor, font = WIDTH - RIGHT, HEIGHT - BOTTOM, _font(TEXT)

    def x(value: float) -> float:
        return across.place(value, LEFT, right)

    def y(value: float) -> float:
        return up.place(value, floor, TOP)

    for value, words in up.ticks(6):
        draw.line((LEFT, y(value), right, y(value)), fill=FAINT, width=2)
        draw.text((LEFT - 14, y(value)), words, fill=MUTED, font=font, anchor="rm")
    for value, words in across.ticks(8):
        draw.line((x(value), floor, x(value), floor + 8), fill=MUTED, width=2)
        draw.text((x(value), floor + 14), words, fill=MUTED, font=font, anchor="ma")
    draw.line((LEFT, floor, right, floor), fill=MUTED, width=2)
    draw.text(((LEFT + right) / 2, HEIGHT - 20), across.title, fill=MUTED, font=font, anchor="mb")
    draw.text((20, TOP - 22), up.title, fill=MUTED, font=font, anchor="lb")
    return x, y


def _label(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], words: str, taken: list[tuple[float, float, float, float]]
) -> None:
    """Write a name beside a dot where no other name is; where there is no room, leave it out."""
    (left, top), width = place, _font(TEXT).getlength(words)
    for shift, rise in ((16, -28), (-16 - width, -28), (16, 6), (-16 - width, 6)):
        box = (left + shift, top + rise, left + shift + width, top + rise + TEXT)
        free = all(box[2] < other[0] or other[2] < box[0] or box[3] < other[1] or other[3] < box[1] for other in taken)
        if free and box[0] > LEFT and box[2] < WIDTH - 4:
            draw.text(box[:2], words, fill=INK, font=_font(TEXT), stroke_width=4, stroke_fill=PAPER)
            taken.append(box)
            return


def _dot(draw: ImageDraw.ImageDraw, left: float, top: float, radius: float, colour: str, hollow: bool = False) -> None:
    box = (left - radius, top - radius, left + radius, top + radius)
    draw.ellipse(box, fill=PAPER if hollow else colour, outline=colour if hollow else PAPER, width=4 if hollow else 2)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _ends(values: Sequence[float], margin: float) -> Ends:
    """The ends of an axis: all values with a margin, of a single value some of itself."""
    low, high = min(values), max(values)
    room = (high - low) * margin if high > low else abs(high) * 0.1 or 1.0
    return low - room, high + room


def _within(ends: Ends, value: float) -> bool:
    return ends[0] <= value <= ends[1]


def _plain(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}"


def _signed(value: float, decimals: int) -> str:
    return f"{value:+.{decimals}f}" if round(value, decimals) else f"{0:.{decimals}f}"


def _clean(name: str) -> str:
    """A name on one line: Pillow measures no other."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(name))
