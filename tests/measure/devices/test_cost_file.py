"""What a cost table says of tiles, those of GPUs included, whose warps JSON holds as a list."""

import json
from dataclasses import asdict
from pathlib import Path

from qsearch.kernels.cuda import Tile
from qsearch.measure.devices.cost_file import CostFile, KernelTime


def test_the_fastest_tile_of_a_gpu_is_found_again() -> None:
    slow, fast = Tile(64, 64, 64, (2, 2, 1), 3), Tile(128, 32, 64, (4, 1, 1), 2)
    kernels = {
        name: KernelTime(seconds, 0.0, "conv2d", "one operation", json.loads(json.dumps(asdict(tile))), "group")
        for name, tile, seconds in (("a", slow, 2e-6), ("b", fast, 1e-6))
    }
    table = CostFile(Path("table.json"), "", "some GPU", {}, "demo", "", 0.0, 0.0, kernels)
    assert Tile(**table.tiles()["group"]) == fast
