"""`cache`: what the cache holds, whether it is whole, and room made in it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qsearch.commands.options import Json
from qsearch.commands.terminal import print_json, print_table, say

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["cache"]

# Damaged entries that are named.
NAMED = 5


def cache(
    folder: Annotated[Path | None, typer.Option(help="The cache.", show_default="studies/cache")] = None,
    check: Annotated[bool, typer.Option("--check", help="Read every entry, and drop those that are damaged.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Drop what was used longest ago until --max-bytes are left.")] = False,
    max_bytes: Annotated[
        int | None, typer.Option(min=0, help="With --prune: bytes that may stay.", show_default="QSEARCH_CACHE_BYTES, or 20 GiB")
    ] = None,
    json: Json = False,
) -> None:
    """Show what the cache of kernels, images and statistics holds; check it, or make room in it.

    Whatever is dropped is made again when it is next needed.
    """
    from qsearch.errors import UsageError
    from qsearch.search.evaluation.cache_entries import cache_entries, evict, is_entry_whole
    from qsearch.search.evaluation.cache_folder import cache_to_itself, most_bytes
    from qsearch.search.evaluation.evaluator import CACHE

    path = folder or CACHE
    if max_bytes is not None and not prune:
        raise UsageError("--max-bytes is what --prune leaves: give both")
    if not path.is_dir():
        raise UsageError(
            f"there is no cache {path}: a search makes studies/cache in the folder it is run in, --folder names another"
        )
    damaged, dropped = [], []
    if check or prune:
        with cache_to_itself(path):
            if check:
                damaged = evict([one for one in cache_entries(path) if not is_entry_whole(one)], 0)
            if prune:
                dropped = evict(cache_entries(path), most_bytes() if max_bytes is None else max_bytes)
    entries = cache_entries(path)
    kinds = _by_kind(entries)
    if json:
        told = {"damaged": [str(one.main) for one in damaged], "dropped": [str(one.main) for one in dropped]}
        print_json({"folder": str(path), "kinds": kinds, "bytes": sum(one.bytes for one in entries), **told})
        return
    print_table(_table(kinds))
    if check:
        names = ", ".join(one.main.name for one in damaged[:NAMED]) + (", ..." if len(damaged) > NAMED else "")
        say(f"{len(damaged)} damaged entries" + (f" dropped: {names}" if damaged else ""))
    if prune:
        say(f"{len(dropped)} entries dropped, {sum(one.bytes for one in dropped):,} bytes")


def _by_kind(entries: list[Any]) -> dict[str, dict[str, Any]]:
    from qsearch.search.evaluation.cache_entries import KINDS

    now, kinds = time.time(), {}
    for kind in KINDS:
        ages = [(now - one.used) / 86400 for one in entries if one.kind == kind]
        size = sum(one.bytes for one in entries if one.kind == kind)
        kinds[kind] = {"entries": len(ages), "bytes": size, "oldest_use_days": round(max(ages), 2) if ages else None}
    return kinds


def _table(kinds: dict[str, dict[str, Any]]) -> Table:
    from rich.table import Table

    from qsearch.report.pictures import byte_text

    table = Table("kind", "entries", "size", "unused for at most, days")
    for kind, one in kinds.items():
        days = "" if one["oldest_use_days"] is None else f"{one['oldest_use_days']:.1f}"
        table.add_row(kind, str(one["entries"]), byte_text(one["bytes"]), days)
    return table
