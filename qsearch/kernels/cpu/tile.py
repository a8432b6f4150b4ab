"""Which register tile a convolution uses: a cost formula over the tiles that fit the registers."""

from __future__ import annotations

from dataclasses import dataclass

from qsearch.kernels.cpu.isa import Isa

__all__ = ["Tile", "choose_tile"]

# Cycles a chain of dependent dot steps needs per step, however few accumulators are in flight.
DOT_LATENCY = 5
MAX_TILE_PIXELS = 14
# Cycles a weight vector costs per step because it comes from the second cache; measured on 7 x 7 images, where
# tiles of 14 pixels x 2 vectors beat tiles of 5 x 5 by a quarter at the same number of dots.
WEIGHT_STREAM = 0.2


@dataclass(frozen=True)
class Tile:
    """A register tile: `rows` x `cols` output pixels times `columns` vectors of output channels."""

    rows: int
    cols: int
    columns: int

    @property
    def pixels(self) -> int:
        """Output pixels of the tile."""
        return self.rows * self.cols


def choose_tile(rows: int, cols: int, columns: int, isa: Isa) -> Tile:
    """Pick the tile with the least predicted time for a grid of output pixels.

    A step of a tile issues pixels * columns dot instructions (two a cycle), and loads pixels activations and
    `columns` weight vectors (two a cycle); it cannot be shorter than the latency of a dot. Weights stream from
    beyond the first cache, so wide tiles are charged for them. Remainder tiles along both pixel axes and the
    channel axis are charged what they cost.

    Args:
        rows: Rows of the output grid.
        cols: Columns of the output grid.
        columns: Vectors of output channels.
        isa: Instruction set.
    """
    candidates = [
        Tile(ty, tx, nr)
        for nr in range(1, 7)
        for tx in range(1, MAX_TILE_PIXELS + 1)
        for ty in range(1, MAX_TILE_PIXELS // tx + 1)
        if nr <= columns and tx <= cols and ty <= rows and ty * tx * nr + nr + 1 < isa.registers
    ]
    return min(candidates, key=lambda tile: (_cost(tile, rows, cols, columns), tile.rows, -tile.columns))


def _cost(tile: Tile, rows: int, cols: int, columns: int) -> float:
    total = 0.0
    for ty, row_tiles in _pieces(rows, tile.rows):
        for tx, col_tiles in _pieces(cols, tile.cols):
            for nr, column_tiles in _pieces(columns, tile.columns):
                pixels = ty * tx
                step = max(pixels * nr / 2, (pixels + nr) / 2, DOT_LATENCY)
                total += row_tiles * col_tiles * column_tiles * (step + WEIGHT_STREAM * nr)
    return total


def _pieces(total: int, size: int) -> list[tuple[int, int]]:
    return [(length, count) for length, count in ((size, total // size), (total % size, 1)) if length and count]
