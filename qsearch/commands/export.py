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
    from qsearch.export.bundle import require_vacant
    from qsearch.report.documents import baseline_of, settings_of
    from qsearch.search.front import kept_points, study_front, study_point
    from qsearch.search.front import pick as pick_point
    from qsearch.search.study import load_study, recorded_parts

    chosen = {"--trial": trial is not None, "--pick": pick is not None, "--all": all_points}
    given = [option for option, is_given in chosen.items() if is_given]
    if len(given) > 1 or (max_loss_pp is not None and given in (["--trial"], ["--all"])):
        given += [] if max_loss_pp is None else ["--max-loss-pp"]
        raise UsageError(f"{' and '.join(given)} contradict each other: give one of --trial, --all, or --pick with --max-loss-pp")
    handle = load_study(study, storage)
    with handle.guard():
        front, baseline = study_front(handle.study), baseline_of(handle)
        if trial is not None:
            points = [study_point(handle.study, trial)]
        else:
            picked, kept = pick_point(front, pick or "knee", max_loss_pp, baseline), list(kept_points(front))
            points = kept if all_points and kept and picked.number is not None else [picked]
        settings, parts = settings_of(handle), recorded_parts(handle.study)
    if points[0].number is None:
        say("nothing that was tried beats float in any objective: float itself is exported")
    names = ["float" if point.number is None else f"trial-{point.number}" for point in points]
    directories = [out / name if all_points else out for name in names]
    for directory in directories:
        # Said before the model is loaded, and before the first of many bundles is written.
        require_vacant(directory)
    with stdout_reserved():
        from qsearch.export.from_study import check_identity, check_kernels, export_point
        from qsearch.search.evaluation.objective import prepare_evaluator

        evaluator = prepare_evaluator(settings, say)
        check_identity(study, parts, evaluator.identity)
        if not remeasure:
            check_kernels(evaluator, points)
        if evaluator.away is not None:
            say(f"compiling for {evaluator.target.description}, which is not run here; `verify` the bundle on the device")
        assert baseline is not None
        rows = []
        for point, directory in zip(points, directories, strict=True):
            rows.append(export_point(evaluator, point, baseline, directory))
            again = ", measured again" if rows[-1]["remeasured"] else ""
            what = "float" if point.number is None else f"trial {point.number}"
            say(f"{what} -> {directory} ({rows[-1]['module_bytes']:,} bytes{again})")
    if json:
        print_json({"study": study, "bundles": rows})
