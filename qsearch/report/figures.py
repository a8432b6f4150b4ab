"""The figures of a report as files: a picture and a table of each."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from qsearch.errors import UsageError
from qsearch.report.figure_pictures import draw_front, draw_heldout, draw_history, draw_map
from qsearch.report.table_pictures import draw_tables
from qsearch.whole_files import make_folder, write_whole

__all__ = ["write_figures"]

Document = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class _Figure:
    """A figure.

    Attributes:
        name: Of its files.
        draw: Draws it.
        rows: What it shows, at least one row.
    """

    name: str
    draw: Callable[[], Image.Image]
    rows: Rows


def write_figures(document: Document, folder: Path) -> list[Path]:
    """Write NAME.png and NAME.csv of every figure that a study has something to show in.

    Args:
        document: Of `qsearch.report.page_document.page_document`.
        folder: Where; made if it is not there, earlier figures in it are replaced.

    Returns:
        The files.

    Raises:
        UsageError: They cannot be written there.
    """
    written = []
    try:
        make_folder(folder)
        for figure in _figures(document):
            picture, table = folder / f"{figure.name}.png", folder / f"{figure.name}.csv"
            with write_whole(picture) as stream:
                figure.draw().save(stream, format="PNG", optimize=True)
            with write_whole(table) as stream:
                stream.write(_csv(figure.rows))
            written += [picture, table]
    except OSError as error:
        raise UsageError(f"--figures: {folder} cannot be written to: {error.strerror or error}; give another folder") from error
    return written


def _figures(document: Document) -> list[_Figure]:
    points, name = document["points"], document["study"]["study"]
    again = [point for point in points if point["heldout"]]
    everything = [
        _Figure("front-latency", lambda: draw_front(document, "latency_ms"), _front_rows(document, "latency_ms")),
        _Figure("front-bytes", lambda: draw_front(document, "peak_bytes"), _front_rows(document, "peak_bytes")),
        _Figure("precisions", lambda: draw_map(document), _map_rows(document)),
        _Figure("heldout", lambda: draw_heldout(document), [_heldout_row(point) for point in again]),
        _Figure("history", lambda: draw_history(document), document["history"]),
        _Figure("layers", lambda: draw_tables(document["tables"], f"{name}: cost and sensitivity"), document["tables"]),
    ]
    # Of an empty front there is float alone, which makes no figure.
    return [one for one in everything if one.rows and (points or one.name in ("history", "layers"))]


def _front_rows(document: Document, measure: str) -> Rows:
    rows = [
        {
            "point": point["name"],
            "kind": point["kind"],
            measure: point[measure],
            "loss_pp": point["top1_loss_pp"],
            "loss_low_pp": point["top1_loss_ci_pp"][0],
            "loss_high_pp": point["top1_loss_ci_pp"][1],
        }
        for point in document["points"]
    ]
    base = document["study"]["baseline"]
    others = [{"point": "float", "kind": "float", measure: base[measure], "loss_pp": 0.0}] if base else []
    others += [
        {"point": one["name"], "kind": "other", measure: one[measure], "loss_pp": one["top1_loss_pp"]}
        for one in document["others"]
    ]
    return [*rows, *others]


def _map_rows(document: Document) -> Rows:
    """A row per layer, a column per point."""
    return [
        {"layer": layer["name"], "type": layer["type"], "weights": layer["weights"]}
        | {point["name"]: point["precisions"][at] for point in document["points"]}
        for at, layer in enumerate(document["layers"])
    ]


def _heldout_row(point: Mapping[str, Any]) -> dict[str, Any]:
    again = point["heldout"]
    return {
        "point": point["name"],
        "loss_pp": point["top1_loss_pp"],
        "loss_low_pp": point["top1_loss_ci_pp"][0],
        "loss_high_pp": point["top1_loss_ci_pp"][1],
        "heldout_loss_pp": again["top1_loss_pp"],
        "heldout_loss_low_pp": again["top1_loss_ci_pp"][0],
        "heldout_loss_high_pp": again["top1_loss_ci_pp"][1],
        "heldout_images": again["images"],
        "latency_ms": point["latency_ms"],
        "latency_again_ms": again["latency_ms"],
        "dominated_by": again["dominated_by"],
    }


def _csv(rows: Rows) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
