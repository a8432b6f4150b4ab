"""`export`: a trial of a study as a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qsearch.commands.options import Json, Storage, Study
from qsearch.commands.terminal import print_json, say, stdout_reserved

__all__ = ["export"]


def export(
    study: Study,
    out: Annotated[Path, typer.Option(help="Directory to write; with --all, one directory per trial inside it.")],
    storage: Storage = None,
    trial: Annotated[int | None, typer.Option(min=0, help="Number of the trial; default: --pick.")] = None,
    pick: Annotated[str | None, typer.Option(help="knee, fastest, smallest or most-accurate.", show_default="knee")] = None,
    max_loss_pp: Annotated[
        float | None, typer.Option(help="Pick only among points that lose at most so many percentage points.")
    ] = None,
    all_points: Annotated[bool, typer.Option("--all", help="Export every point of the front.")] = False,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="Measure trials whose kernels have changed again, and say so in the bundle.")
    ] = False,
    json: Json = False,
) -> None:
    """Export a trial: the compiled module with everything needed to run and check it."""
    from qsearch.errors import UsageError
    from qsearch.search.study import load_study
    from qsearch.session.export_session import ExportRequest, run_export

    chosen = {"--trial": trial is not None, "--pick": pick is not None, "--all": all_points}
    given = [option for option, is_given in chosen.items() if is_given]
    if len(given) > 1 or (max_loss_pp is not None and given in (["--trial"], ["--all"])):
        given += [] if max_loss_pp is None else ["--max-loss-pp"]
        raise UsageError(f"{' and '.join(given)} contradict each other: give one of --trial, --all, or --pick with --max-loss-pp")
    handle = load_study(study, storage)
    request = ExportRequest(out, trial, pick or "knee", max_loss_pp, all_points, remeasure)
    with stdout_reserved():
        rows = run_export(handle, request, say)
    if json:
        print_json({"study": study, "bundles": rows})
