"""A comparison for the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from qsearch.report.pictures import byte_text
from qsearch.report.tables import plain_table

__all__ = ["comparison_text"]

SHOWN = 40
# What the rows of a comparison are called, and how their values are written.
_NAMES: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "latency_ms": ("latency, ms", lambda value: f"{value:.3f}"),
    "speedup": ("speed-up over float", lambda value: f"{value:.2f}"),
    "peak_bytes": ("memory", byte_text),
    "weight_bytes": ("weights", byte_text),
    "top1_loss_pp": ("{metric} loss, pp", lambda value: f"{value:+.2f}"),
    "heldout_latency_ms": ("latency measured again, ms", lambda value: f"{value:.3f}"),
    "heldout_top1_loss_pp": ("held-out loss, pp", lambda value: f"{value:+.2f}"),
}


def comparison_text(document: Mapping[str, Any]) -> list[str | Table]:
    """The whole comparison, to be printed part by part.

    Args:
        document: Of `qsearch.session.comparison.comparison_document`.
    """
    parts: list[str | Table] = [f"a: {document['a']['title']}", f"b: {document['b']['title']}"]
    if document["metrics"]:
        parts.append(_metrics(document))
    if document["methods"]:
        table = plain_table("methods that differ", ("key", "a", "b"))
        for key, (a, b) in document["methods"].items():
            table.add_row(key, escape(_words(a)), escape(_words(b)))
        parts.append(table)
    return [*parts, *_layers(document["layers"]), *document["remarks"]]


def _metrics(document: Mapping[str, Any]) -> Table:
    sides = [document[side]["metrics"] for side in ("a", "b")]
    metric = next(side["metric"] for side in sides if side is not None)
    table = plain_table("metrics", ("",), ("a", "b", "b against a"), ("",))
    for row in document["metrics"]:
        name, words = _NAMES[row["name"]]
        cells = [_cell(row[side], row[f"{side}_interval"], words) for side in ("a", "b")]
        apart = {None: "", True: "beyond the intervals", False: "intervals overlap"}[row["apart"]]
        table.add_row(name.format(metric=metric), *cells, _change(row), apart)
    fronts = [document[side]["front"] for side in ("a", "b")]
    if None not in fronts:
        table.add_row("points on the front", *(str(front["points"]) for front in fronts))
        table.add_row("hypervolume", *(f"{front['hypervolume']:.4f}" for front in fronts))
    return table


def _cell(value: Any, interval: Any, words: Callable[[Any], str]) -> str:
    if value is None:
        return ""
    return words(value) + ("" if interval is None else f" ({words(interval[0])} to {words(interval[1])})")


def _change(row: Mapping[str, Any]) -> str:
    a, b = row["a"], row["b"]
    if a is None or b is None:
        return ""
    if row["name"].endswith("loss_pp"):
        return f"{b - a:+.2f} pp"
    return f"{100 * (b / a - 1):+.1f} %" if a else ""


def _layers(layers: Mapping[str, Any]) -> list[str | Table]:
    differ, count = layers["differ"], layers["count"]
    if not count:
        return ["neither names a layer"]
    if not differ:
        return [f"all {count} layers are alike"]
    table = plain_table(f"layers that differ, {len(differ)} of {count}", ("layer", "type", "a", "b", "methods"))
    for one in differ[:SHOWN]:
        methods = [f"{key} {_words(a)} -> {_words(b)}" for key, (a, b) in one["differences"].items() if key != "precision"]
        table.add_row(escape(one["layer"]), one["type"] or "", one["a"], one["b"], escape(", ".join(methods)))
    more = len(differ) - SHOWN
    return [table, f"and {more} more layers; --json has them all"] if more > 0 else [table]


def _words(value: Any) -> str:
    if isinstance(value, Mapping) and "mode" in value:
        number = {"percentile": value["percentile"], "global_scale": value["global_scale"]}.get(value["mode"])
        return value["mode"] if number is None else f"{value['mode']} {number:g}"
    return value if isinstance(value, str) else json.dumps(value)
