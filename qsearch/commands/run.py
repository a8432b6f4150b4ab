"""`run`: classify pictures, or find things on them, with a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qsearch.commands.options import ConvertChannels, Json, Trust
from qsearch.commands.terminal import print_json

__all__ = ["run"]

# Mean average precision wants the weak boxes as well; a person does not.
LEAST_SHOWN = 0.3


def run(
    bundle: Annotated[Path, typer.Argument(metavar="DIR", help="A bundle that export wrote.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Picture files.")],
    convert_channels: ConvertChannels = False,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Classify pictures with a bundle; a detector's bundle says what is where on them."""
    import numpy as np

    from qsearch.data import decode
    from qsearch.export.verify import detect_images, predict_images, read_bundle_detection, read_bundle_preprocessing

    preprocessing = read_bundle_preprocessing(bundle)
    given = np.stack([decode(path, preprocessing, convert_channels) for path in images])
    head = read_bundle_detection(bundle)
    rows = predict_images(bundle, given, trust) if head is None else detect_images(bundle, given, head, trust)
    if json:
        key = "best" if head is None else "boxes"
        print_json([{"image": str(path), key: row} for path, row in zip(images, rows, strict=True)])
        return
    if head is not None:
        for path, row in zip(images, rows, strict=True):
            shown = [entry for entry in row if entry["score"] >= LEAST_SHOWN]
            for entry in shown:
                edges = ", ".join(f"{edge:.1f}" for edge in entry["box"])
                typer.echo(f"{path}: {entry['name']} {100 * entry['score']:.1f} % at {edges}")
            weaker = len(row) - len(shown)
            typer.echo(f"{path}: boxes found: {len(shown)}; below {100 * LEAST_SHOWN:.0f} %, with --json: {weaker} more")
        return
    for path, row in zip(images, rows, strict=True):
        best = ", ".join(
            entry["name"] + (f" {100 * entry['probability']:.1f} %" if "probability" in entry else "") for entry in row
        )
        typer.echo(f"{path}: {best}")
