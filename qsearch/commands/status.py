"""`status`: how far a search is."""

from __future__ import annotations

from qsearch.commands.options import Json, Storage, Study
from qsearch.commands.terminal import print_json, print_table

__all__ = ["status"]


def status(study: Study, storage: Storage = None, json: Json = False) -> None:
    """Show how far a study is: trials, their rate, failures by cause, and how long the rest will take.

    It may be asked while the search runs.
    """
    from qsearch.report.status_document import status_document, status_table
    from qsearch.search.study import load_study

    document = status_document(load_study(study, storage))
    if json:
        print_json(document)
    else:
        print_table(status_table(document))
