"""`report`: a study as one page that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qsearch.commands.options import Json, Storage, Study
from qsearch.commands.terminal import print_json, say

__all__ = ["report"]


def report(
    study: Study,
    out: Annotated[Path, typer.Option(help="HTML file to write.")],
    storage: Storage = None,
    figures: Annotated[Path | None, typer.Option(help="Directory to write a PNG and a CSV file of each figure to.")] = None,
    json: Json = False,
) -> None:
    """Write a study as one page: front, precisions, second measurement, history, how to export. It needs no network."""
    from qsearch.report.figures import write_figures
    from qsearch.report.page_document import page_document
    from qsearch.report.page_file import write_page
    from qsearch.search.study import load_study

    document = page_document(load_study(study, storage))
    write_page(document, out)
    say(f"report of study {study} -> {out}")
    written = write_figures(document, figures) if figures is not None else []
    if figures is not None:
        say(f"{len(written)} files of figures -> {figures}")
    if json:
        print_json({"report": str(out), "figures": [str(file) for file in written], **document})
