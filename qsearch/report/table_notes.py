"""The planner's tables as part of a study: their rows, a picture of them, and a note that the dashboard shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qsearch.report.artifacts import attach_picture
from qsearch.report.notes import write_study_note
from qsearch.report.pictures import byte_text
from qsearch.report.table_pictures import draw_tables
from qsearch.search.storage import artifact_folder
from qsearch.search.study import StudyHandle
from qsearch.whole_files import make_folder

__all__ = ["attach_tables", "table_rows"]

_TABLES = "tables"
# Rows of the note; the picture shows all of them.
SHOWN = 10


def table_rows(handle: StudyHandle) -> list[dict[str, Any]]:
    """The rows of the tables that a study was planned with, see `layer_rows`; none where it was not."""
    return list(handle.study.user_attrs.get(_TABLES, []))


def attach_tables(handle: StudyHandle, rows: Sequence[Mapping[str, Any]]) -> None:
    """Keep the tables in a study: their rows as an attribute, a picture as an artifact, a note with the most sensitive.

    Tables that the study has already are not attached again.

    Args:
        handle: The study.
        rows: Of `qsearch.search.tables.layer_tables.layer_rows`.
    """
    study, kept = handle.study, [dict(row) for row in rows]
    with handle.guard():
        if not kept or table_rows(handle) == kept:
            return
        folder = artifact_folder(handle.name, handle.url)
        make_folder(folder)
        picture = draw_tables(kept, f"{handle.name}: cost and sensitivity of every layer")
        artifact = attach_picture(study, folder, "tables.png", picture)
        write_study_note(study, _note(kept, f"/artifacts/{study._study_id}/{artifact}"))
        study.set_user_attr(_TABLES, kept)


def _note(rows: Sequence[Mapping[str, Any]], picture: str) -> str:
    """Markdown: the picture and the most sensitive rows."""
    lines = [
        "## What the planner knows of the layers",
        f"![cost and sensitivity of every layer]({picture})",
        "",
        "| most sensitive | precision | divergence, nats | latency, us | weights |",
        "|---|---|---|---|---|",
    ]
    for row in rows[:SHOWN]:
        held = row["weight_bytes"]
        weights = ("-" if held < 0 else "+") + byte_text(abs(held))
        lines.append(
            f"| {row['layer']} | {row['precision']} | {row['divergence']:.2e} | {1e3 * row['latency_ms']:+.1f} | {weights} |"
        )
    lines += ["", "Latency and weights are against the layer's first precision."]
    return "\n".join(lines)
