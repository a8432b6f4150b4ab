"""`compare`: two studies, bundles or configurations side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from qsearch.commands.options import Json, Storage
from qsearch.commands.terminal import print_json, print_table

__all__ = ["compare"]

_SIDE = "A study (NAME, NAME:TRIAL or NAME:PICK; the knee unless said), a bundle's directory, or a configuration's .json file."


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help=_SIDE)],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one, of the same model.")],
    storage: Storage = None,
    json: Json = False,
) -> None:
    """Compare two of a model's configurations: what was measured of each, and the layers in which they differ."""
    from qsearch.report.comparison_tables import comparison_text
    from qsearch.session.compared import open_compared
    from qsearch.session.comparison import comparison_document

    document = comparison_document(open_compared(a, storage), open_compared(b, storage))
    if json:
        print_json(document)
        return
    for part in comparison_text(document):
        if isinstance(part, str):
            typer.echo(part)
        else:
            print_table(part)
