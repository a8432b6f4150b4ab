"""`front`: the Pareto front of a study."""

from __future__ import annotations

from qsearch.commands.options import Json, Storage, Study
from qsearch.commands.terminal import print_json, print_table, say

__all__ = ["front"]


def front(study: Study, storage: Storage = None, json: Json = False) -> None:
    """Show the Pareto front of a study against float."""
    from qsearch.report.documents import baseline_of, study_document
    from qsearch.report.tables import NOTHING_BEATS_FLOAT, front_words, study_table
    from qsearch.search.study import load_study

    handle = load_study(study, storage)
    document = study_document(handle)
    if json:
        print_json(document)
        return
    with handle.guard():
        baseline = baseline_of(handle)
    if baseline is None or not document["front"] + document["closest"]:
        say(f"study {study} has no completed trial yet; the search that made it continues with the same command")
        return
    print_table(study_table(handle, baseline))
    if document["beats_float"] is False:
        say(NOTHING_BEATS_FLOAT)
    say(front_words(document))
