"""Register tiles that were timed, remembered beside the kernels.

A tile is a fact about geometry, precision and machine; what a layer adds, clips or converts at its end shares it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tvm

from qsearch.build.target import Target, Tile
from qsearch.quantize.program import OpKey
from qsearch.whole_files import write_whole

__all__ = ["TileChoices"]


class TileChoices:
    """Tiles by operation, on disk and in memory.

    Args:
        directory: The kernel cache.
        target: What the kernels are compiled for.
    """

    def __init__(self, directory: Path, target: Target) -> None:
        self.directory, self.target = directory, target
        self._known: dict[str, Tile | None] = {}

    def name(self, key: OpKey) -> str:
        """What operations of one geometry and precision share."""
        target = self.target
        machine = (target.isa.name, target.mcpu, target.triple, target.threads, tvm.__version__, *filter(None, [target.arch]))
        content = repr((key.shapes[0], key.shapes[-1], key.conv, key.precision, machine))
        return "tile_" + hashlib.sha256(content.encode()).hexdigest()[:24]

    def get(self, key: OpKey) -> Tile | None:
        """The tile remembered for an operation; a file that cannot be read counts as none."""
        name = self.name(key)
        if name not in self._known:
            try:
                self._known[name] = self.target.tile(json.loads((self.directory / f"{name}.json").read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                self._known[name] = None
        return self._known[name]

    def hold(self, tiles: Mapping[str, Mapping[str, Any]]) -> None:
        """Use tiles, by the names of what shares them, without remembering them on disk: another device's choices."""
        self._known |= {name: self.target.tile(tile) for name, tile in tiles.items()}

    def put(self, key: OpKey, tile: Tile) -> None:
        """Remember a tile."""
        name = self.name(key)
        self._known[name] = tile
        with write_whole(self.directory / f"{name}.json") as stream:
            stream.write(json.dumps(asdict(tile)).encode())
