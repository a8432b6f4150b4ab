"""The picture of the planner's tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from qsearch.report.pictures import COLOURS, HEADER, LEFT
from qsearch.report.table_pictures import HEADING, HEIGHT, draw_tables

NAMES = ("int16", "int8", "w4a8")


def rows(layers: int, precisions: tuple[str, ...] = NAMES, scale: float = 1.0) -> list[dict[str, Any]]:
    """Rows of a network whose layers grow; the most sensitive first, as they come."""
    found = [
        {
            "layer": f"blocks.{i}.conv",
            "position": i,
            "precision": name,
            "divergence": scale * 10.0 ** (-4 + 3 * i / layers + place),
            "latency_ms": scale * 1e-3 * (i - layers / 2),
            "weight_bytes": -scale * 1000.0 * i,
        }
        for i in range(layers)
        for place, name in enumerate(precisions)
    ]
    return found[::-1]


def columns_of(image: Image.Image, panel: int, precision: str) -> np.ndarray:
    """Columns in which a panel shows a precision's colour, and how many pixels of it."""
    top = HEADER + panel * (HEADING + HEIGHT) + HEADING
    part = np.asarray(image)[top : top + HEIGHT + 1, LEFT:]
    colour = np.array(tuple(bytes.fromhex(COLOURS[precision][1:])))
    return (part == colour).all(2).sum(0)


@pytest.mark.parametrize("layers", [1, 52, 200])
def test_every_layer_has_a_bar_of_every_precision(layers: int) -> None:
    image = draw_tables(rows(layers), "a network")
    assert image.width < 60 + 40 * max(layers, 20)
    for panel in range(3):
        for name in NAMES:
            shown = columns_of(image, panel, name) > 0
            bars = int((np.diff(shown.astype(int), prepend=0) == 1).sum())
            assert bars == layers, (panel, name)


def test_bars_are_in_the_order_of_the_network_and_as_high_as_their_values() -> None:
    heights = columns_of(draw_tables(rows(12, ("int8",)), "a network"), 0, "int8")
    bars = heights[np.flatnonzero(np.diff((heights > 0).astype(int), prepend=0) == 1)]
    assert len(bars) == 12 and (np.diff(bars) > 0).all()
    # Weights shrink with the depth, so that their bars hang lower and lower.
    lower = columns_of(draw_tables(rows(12, ("int8",)), "a network"), 2, "int8")
    assert lower.argmax() > 10 * lower.nonzero()[0][0]


def test_tables_of_nothing_but_zeros_are_drawn() -> None:
    image = draw_tables(rows(3, ("int8",), scale=0.0), "a network")
    assert (columns_of(image, 1, "int8") > 0).any()
