"""`doctor`: what this machine has of what a search needs, and what to do about the rest."""

from __future__ import annotations

import typer

from qsearch.commands.options import Json, Target
from qsearch.commands.terminal import print_json, print_table, stdout_reserved

__all__ = ["doctor"]


def doctor(target: Target = "llvm", json: Json = False) -> None:
    """Look at what a search needs on this machine: versions, compiler, test kernels, CUDA, disk; each problem with its remedy.

    The exit status is 0 if modules can be compiled and run on this machine's CPU, else 1.
    """
    with stdout_reserved():
        from qsearch.build.target import open_target
        from qsearch.measure.doctor.cuda import check_cuda
        from qsearch.measure.doctor.host import check_host
        from qsearch.search.evaluation.evaluator import CACHE

        own = "host" if target.partition(":")[0] == "cuda" else target
        found = [*check_host(open_target(own), CACHE), *check_cuda(target)]
    works = all(one.state == "ok" for one in found if one.part == "host")
    if json:
        print_json({"target": target, "host_works": works, "checks": [one.to_json() for one in found]})
    else:
        from rich.table import Table

        table = Table(title=f"this machine, for target {target}", title_justify="left")
        for name in ("what", "state", "found", "remedy"):
            table.add_column(name)
        for one in found:
            table.add_row(one.name, one.state, one.found, one.remedy)
        print_table(table)
    if not works:
        raise typer.Exit(1)
