"""`adapt`: drift of a deployed bundle's tensors, new scales for it, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from qsearch.commands.options import ConvertChannels, Json, Trust
from qsearch.commands.terminal import print_json, print_table, say, stdout_reserved

if TYPE_CHECKING:
    from qsearch.adapt.session import Adaptation
    from qsearch.adapt.validate import Trial

__all__ = ["adapt"]

# Rows of the table; --json has all.
SHOWN = 12


def adapt(
    bundle: Annotated[Path, typer.Argument(metavar="DIR", help="A bundle that export wrote.")],
    stats: Annotated[Path | None, typer.Option(help="What the bundle's monitor.py has recorded.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Labelled images to try new scales on: one folder per class, or labels.csv. Default: the recorded ones."
        ),
    ] = None,
    convert_channels: ConvertChannels = False,
    apply: Annotated[bool, typer.Option("--apply", help="Put a version with the new scales in the bundle's place.")] = False,
    back: Annotated[bool, typer.Option("--rollback", help="Put the version back that the bundle was made from.")] = False,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Compare what a deployed module's tensors hold with calibration; propose, try and apply new scales, without a compiler."""
    from qsearch.errors import UsageError

    if back == (stats is not None):
        raise UsageError("give either --stats FILE, or --rollback")
    if back and (apply or data is not None):
        raise UsageError("--rollback takes no other option but --json: leave --apply and --data out")
    if back:
        _roll_back(bundle, json)
        return
    assert stats is not None
    from qsearch.adapt.session import adapt_bundle, labelled_trial

    with stdout_reserved():
        trial: Trial | None = None if data is None else labelled_trial(bundle, data, convert_channels)
        found = adapt_bundle(bundle, stats, trial, trust)
    document = found.to_json()
    if not json:
        print_table(drift_table(found))
    say(summary(found))
    accepted = found.verdict is not None and found.verdict.accepted
    if accepted and apply:
        document["applied"] = applied(found)
    elif accepted:
        say("nothing was written: --apply puts the new version in the bundle's place")
    if json:
        print_json(document)
    if found.verdict is not None and not accepted:
        raise typer.Exit(1)


def _roll_back(bundle: Path, json: bool) -> None:
    from qsearch.adapt.versions import rollback

    was, now = rollback(bundle)
    say(f"{bundle}: version {now} is back; version {was} is kept as {bundle.name}.v{was}")
    if json:
        print_json({"bundle": str(bundle), "version": now, "was": was})


def applied(found: Adaptation) -> dict[str, Any]:
    """Apply, and say what was done."""
    from qsearch.adapt.session import apply_adaptation

    done = apply_adaptation(found)
    say(
        f"{found.bundle} is version {done['version']} now ({done['seconds']:.2f} s, no compiler); the old one is "
        f"{done['previous']}, and --rollback puts it back"
    )
    return done


def drift_table(found: Adaptation) -> Table:
    """Values, most drifted first."""
    table = Table("value", "index", "threshold", "clipped", "range", "proposed")
    for row in found.values[:SHOWN]:
        ends = "" if row.proposed is None else f"{row.proposed[0]:.3g} to {row.proposed[1]:.3g}"
        index = f"{row.index:.3f}{' *' if row.moved else ''}"
        own = f"{row.range[0]:.3g} to {row.range[1]:.3g}"
        note = ends if row.replaceable else "keeps its scale"
        table.add_row(row.name, index, f"{row.threshold:.3f}", f"{100 * row.clipped:.2f} %", own, note)
    return table


def summary(found: Adaptation) -> str:
    """What was found, in words."""
    moved, total, fixed = _counts(found)
    head = f"{found.statistics.images} images: {moved} of {total} values have moved"
    if fixed:
        head += f" ({fixed} cannot have another scale)"
    if found.scales is None:
        return f"{head}; nothing is proposed"
    verdict = found.verdict
    assert verdict is not None
    text = f"{head}; {'new scales' if verdict.accepted else 'refused'}: {verdict.reason}"
    if verdict.divergence_before or verdict.divergence_after:
        low, high = verdict.gain_ci
        text += (
            f" (distance {verdict.divergence_before:.4f} before, {verdict.divergence_after:.4f} after, gain {low:.4f} to "
            f"{high:.4f}, on {verdict.images} {verdict.source} images)"
        )
    if verdict.right_before is not None and verdict.top1_gain_ci_pp is not None:
        low, high = verdict.top1_gain_ci_pp
        text += f"; right {verdict.right_before} before, {verdict.right_after} after, gain {low:.2f} to {high:.2f} pp"
    return text


def _counts(found: Adaptation) -> tuple[int, int, int]:
    rows = found.values
    return sum(row.moved for row in rows), len(rows), sum(not row.replaceable for row in rows)
