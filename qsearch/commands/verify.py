"""`verify`: check a bundle in a fresh process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qsearch.commands.options import Json, Trust
from qsearch.commands.terminal import print_json, say

__all__ = ["verify"]


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="DIR", help="A bundle that export wrote.")],
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Check a bundle's files, replay its recorded outputs bit for bit, time it alone."""
    from qsearch.export.verify import verify_bundle

    result = verify_bundle(bundle, trust)
    if json:
        print_json(result)
        return
    compares = "" if result["timing"] == result["recorded_timing"] else ": the two do not compare"
    say(
        f"{bundle}: {result['files']} files unchanged, {result['outputs']} recorded outputs replayed with "
        f"{result['mismatching_bits']} mismatching bits; {result['latency_ms']:.3f} ± {result['latency_spread_ms']:.3f} ms "
        f"{result['timing']} (recorded {result['recorded_latency_ms']:.3f} ms, {result['recorded_timing']}{compares})"
    )
