"""`run`: classify pictures with a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qsearch.commands.options import ConvertChannels, Json
from qsearch.commands.terminal import print_json

__all__ = ["run"]


def run(
    bundle: Annotated[Path, typer.Argument(metavar="DIR", help="A bundle that export wrote.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Picture files.")],
    convert_channels: ConvertChannels = False,
    json: Json = False,
) -> None:
    """Classify pictures with a bundle."""
    import numpy as np

    from qsearch.data import decode
    from qsearch.export.verify import predict_images, read_bundle_preprocessing

    preprocessing = read_bundle_preprocessing(bundle)
    given = np.stack([decode(path, preprocessing, convert_channels) for path in images])
    rows = predict_images(bundle, given)
    if json:
        print_json([{"image": str(path), "best": row} for path, row in zip(images, rows, strict=True)])
        return
    for path, row in zip(images, rows, strict=True):
        best = ", ".join(f"{entry['name']} {100 * entry['probability']:.1f} %" for entry in row)
        typer.echo(f"{path}: {best}")
