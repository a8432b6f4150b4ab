"""Which register tile a convolution uses: a cost formula over the tiles that fit the registers."""

from __future__ import annotations

from dataclasses import dataclass

from qsearch.kernels.cpu.isa import Isa

__all__ = ["Tile", "rank_tiles"]

# Cycles a chain of dependent dot steps needs per step, however few accumulators are in flight.
DOT_LATENCY = 5
MAX_TILE_PIXELS = 14
# Measured over 25 shapes of 1 x 1 and 3 x 3 layers. Cycles that every load of a step, and the step itself, cost; cycles
# to fetch one weight vector from the second cache, which bounds tiles and remainders of few pixels; and what a tile
# of many pixels loses on small images, where few tiles reuse its weights.
LOAD = 0.05
STEP = 0.7
FETCH = 2.5
FIRST_CACHE_BYTES = 24 * 1024
MANY_PIXELS, SMALL_GRID, WIDE_PENALTY = 9, 100, 1.4
# Tiles that leave no remainder of pixels were faster than this formula alone predicts on images and small grids.
REMAINDER_PENALTY = 1.2


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


def rank_tiles(grid: tuple[int, int], columns: int, column_bytes: int, isa: Isa) -> list[Tile]:
    """Every tile that fits the registers, the least predicted time for a grid of output pixels first.

    A step of a tile issues pixels * columns dot instructions (two a cycle), and loads pixels activations and
    `columns` weight vectors; it cannot be shorter than the latency of a dot. Remainder tiles along both pixel axes
    and the channel axis are charged what they cost.

    Args:
        grid: Rows and columns of output pixels.
        columns: Vectors of output channels.
        column_bytes: Bytes of one vector's weights over the whole contraction.
        isa: Instruction set.
    """
    rows, cols = grid
    candidates = [
        Tile(ty, tx, nr)
        for nr in range(1, 7)
        for tx in range(1, MAX_TILE_PIXELS + 1)
        for ty in range(1, MAX_TILE_PIXELS // tx + 1)
        if nr <= columns and tx <= cols and ty <= rows and ty * tx * nr + nr + 1 < isa.registers
    ]
    return sorted(candidates, key=lambda tile: (_cost(tile, grid, columns, column_bytes), tile.rows, -tile.columns))


def _cost(tile: Tile, grid: tuple[int, int], columns: int, column_bytes: int) -> float:
    streams = tile.columns * column_bytes > FIRST_CACHE_BYTES
    wide = streams and tile.pixels > MANY_PIXELS and grid[0] * grid[1] < SMALL_GRID
    total = 0.0
    for ty, row_tiles in _pieces(grid[0], tile.rows):
        for tx, col_tiles in _pieces(grid[1], tile.cols):
            for nr, column_tiles in _pieces(columns, tile.columns):
                pixels = ty * tx
                step = max(pixels * nr / 2, DOT_LATENCY, FETCH * nr if streams else 0.0) + LOAD * (pixels + nr) + STEP
                total += row_tiles * col_tiles * column_tiles * step
    uneven = grid[0] % tile.rows or grid[1] % tile.cols
    small = grid[1] > 1 or grid[0] < SMALL_GRID
    return total * (WIDE_PENALTY if wide else 1.0) * (REMAINDER_PENALTY if uneven and small else 1.0)


def _pieces(total: int, size: int) -> list[tuple[int, int]]:
    return [(length, count) for length, count in ((size, total // size), (total % size, 1)) if length and count]
