"""A picture of a diagnosis: the errors of all layers over one another, in the order of the network; below, the remedies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from qsearch.report.pictures import COLOURS, FAINT, HEADER, INK, LEFT, MARGIN, OTHER_COLOUR, PAPER, TEXT, TITLE
from qsearch.report.table_pictures import BAR, HEADING, HEIGHT, NARROWEST, _Axis, _draw_names, _linear_axis, _log_axis
from qsearch.search.diagnosis.diagnosis import Diagnosis
from qsearch.search.diagnosis.layer_errors import LayerError
from qsearch.search.diagnosis.remedies import Remedy

__all__ = ["draw_diagnosis"]

# Of the same palette as the precisions'.
WEIGHTS, ACTIVATIONS, ACCUMULATED, GAINED = "#CC79A7", "#009E73", INK, "#009E73"
ROW = 40
NARROWEST_REMEDIES = 480
LONGEST_NAME = 70

# Per layer, what to draw: (from, to, colour) of bars; the same value twice is a line.
Bars = Sequence[Sequence[tuple[float, float, str]]]


def draw_diagnosis(diagnosis: Diagnosis, title: str) -> Image.Image:
    """Draw a diagnosis.

    Args:
        diagnosis: What was found, of at least one layer.
        title: Name of the configuration.

    Returns:
        An RGB image.
    """
    layers, remedies = sorted(diagnosis.layers, key=lambda one: one.position), diagnosis.remedies.measured
    text, heading = ImageFont.load_default(TEXT), ImageFont.load_default(TITLE)
    low, high = diagnosis.accuracy.top1_loss_ci_pp
    words = f"{title}: {diagnosis.accuracy.top1_loss_pp:+.2f} pp of {diagnosis.accuracy.metric} lost ({low:+.2f} to {high:+.2f})"
    panels, span = _panels(diagnosis, layers), len(layers) * NARROWEST
    long = [heading.getlength(words), *(text.getlength(said) for said, _, _ in panels), NARROWEST_REMEDIES if remedies else 0]
    width = LEFT + max(span, math.ceil(max(long))) + 2 * MARGIN
    under = HEADER + len(panels) * (HEADING + HEIGHT)
    below = under + max(math.ceil(text.getlength(one.layer)) for one in layers) + 2 * MARGIN
    height = below + (HEADING + len(remedies) * ROW + 2 * MARGIN if remedies else 0)
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((LEFT, MARGIN), words, fill=INK, font=heading)
    _draw_legend(draw, layers)
    for index, (said, axis, bars) in enumerate(panels):
        top = HEADER + index * (HEADING + HEIGHT)
        draw.text((LEFT, top + 6), said, fill=INK, font=text)
        _draw_panel(draw, axis, span, bars, top + HEADING)
    _draw_names(image, [one.layer for one in layers], NARROWEST, under + 6)
    if remedies:
        _draw_remedies(draw, remedies, (below, width - MARGIN - LEFT))
    return image


def _panels(diagnosis: Diagnosis, layers: Sequence[LayerError]) -> list[tuple[str, _Axis, Bars]]:
    cost = [one.divergence or 0.0 for one in layers]
    own, all_ = [one.snr_db for one in layers], [one.accumulated_snr_db for one in layers]
    log = _log_axis(cost)
    decibels = _linear_axis([*(value for value in own if value is not None), *all_], lambda value: f"{value:.4g}")
    share = {one.value: one.share for one in diagnosis.clipped}
    clipped = [100.0 * share.get(one.layer, 0.0) for one in layers]
    panels: list[tuple[str, _Axis, Bars]] = [
        (
            f"cost: divergence of the outputs by this layer's error alone, nats (logarithmic), {diagnosis.layer_images} images",
            log,
            [[(log.base, max(value, log.base), _colour(one))] for one, value in zip(layers, cost, strict=True)],
        ),
        (
            "signal to noise, dB: bars the layer's own error, lines with those of all layers before",
            decibels,
            [
                [*([(0.0, value, _colour(one))] if value is not None else []), (total, total, ACCUMULATED)]
                for one, value, total in zip(layers, own, all_, strict=True)
            ],
        ),
        ("share of its own error: weights below, activations above", _shares(), [_share_bars(one) for one in layers]),
    ]
    if any(clipped):
        panels.append(
            (
                "values beyond the range, %",
                _linear_axis(clipped, lambda value: f"{value:.4g}"),
                [[(0.0, value, _colour(one))] if value else [] for one, value in zip(layers, clipped, strict=True)],
            )
        )
    return panels


def _shares() -> _Axis:
    return _Axis(lambda value: value, ((0.0, "0"), (0.5, "0.5"), (1.0, "1")), 0.0)


def _share_bars(one: LayerError) -> list[tuple[float, float, str]]:
    if one.weight_share is None:
        return []
    return [(0.0, one.weight_share, WEIGHTS), (one.weight_share, 1.0, ACTIVATIONS)]


def _colour(one: LayerError) -> str:
    return COLOURS.get(one.precision, OTHER_COLOUR)


def _draw_legend(draw: ImageDraw.ImageDraw, layers: Sequence[LayerError]) -> None:
    found = {one.precision for one in layers}
    entries: Mapping[str, str] = {name: COLOURS.get(name, OTHER_COLOUR) for name in [*COLOURS, *found] if name in found}
    left, top, font = LEFT, MARGIN + 24, ImageFont.load_default(TEXT)
    for name, colour in {**entries, "weights": WEIGHTS, "activations": ACTIVATIONS}.items():
        draw.rectangle((left, top + 1, left + 12, top + 13), fill=colour)
        draw.text((left + 18, top), name, fill=INK, font=font)
        left += 36 + math.ceil(font.getlength(name))


def _draw_panel(draw: ImageDraw.ImageDraw, axis: _Axis, span: int, bars: Bars, top: int) -> None:
    font = ImageFont.load_default(TEXT)

    def height(value: float) -> int:
        return top + HEIGHT - round(min(max(axis.place(value), 0.0), 1.0) * HEIGHT)

    for value, words in axis.ticks:
        draw.line((LEFT - 4, height(value), LEFT + span, height(value)), fill=FAINT)
        draw.text((LEFT - 8, height(value)), words, fill=INK, font=font, anchor="rm")
    for index, of_layer in enumerate(bars):
        left = LEFT + index * NARROWEST + (NARROWEST - BAR) // 2
        for start, end, colour in of_layer:
            low, high = sorted((height(start), height(end)))
            wider = 3 if start == end else 0
            # The smallest value still shows as a line.
            draw.rectangle((left - wider, low, left + BAR - 2 + wider, max(high, low + 1)), fill=colour)


def _draw_remedies(draw: ImageDraw.ImageDraw, remedies: Sequence[Remedy], place: tuple[int, int]) -> None:
    """A bar per remedy from no gain to its gain, with its interval, under its name."""
    (top, span), font = place, ImageFont.load_default(TEXT)
    ends = [end for one in remedies for end in one.gain_ci_pp]
    axis = _linear_axis(ends, lambda value: f"{value:+.4g}" if value else "0")
    least, most = min(0.0, *ends), max(0.0, *ends)

    def across(value: float) -> int:
        return LEFT + round((value - least) / max(most - least, 1e-9) * span)

    words = f"remedies: {remedies[0].accuracy.metric} gained, percentage points, with 95 % intervals"
    draw.text((LEFT, top), words, fill=INK, font=font)
    floor = top + HEADING + len(remedies) * ROW
    for value, words in axis.ticks:
        draw.line((across(value), top + HEADING, across(value), floor + 4), fill=INK if value == 0 else FAINT)
        draw.text((across(value), floor + 8), words, fill=INK, font=font, anchor="ma")
    for index, one in enumerate(remedies):
        row = top + HEADING + index * ROW
        name = one.candidate.name
        name = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 3] + "..."
        left, right = sorted((across(0.0), across(one.gain_pp)))
        draw.rectangle((left, row + 22, max(right, left + 1), row + 32), fill=GAINED if one.helps else FAINT)
        low, high = (across(end) for end in one.gain_ci_pp)
        draw.line((low, row + 27, high, row + 27), fill=INK)
        for end in (low, high):
            draw.line((end, row + 23, end, row + 31), fill=INK)
        shown = f"{name}: {one.gain_pp:+.2f}"
        # On a slip of paper, so that the grid does not cross it.
        draw.rectangle((LEFT + 2, row + 3, LEFT + 6 + font.getlength(shown), row + 19), fill=PAPER)
        draw.text((LEFT + 4, row + 4), shown, fill=INK, font=font)
