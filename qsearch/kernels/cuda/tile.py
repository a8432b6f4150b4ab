"""Which tile of a matrix product a block of threads computes: a cost formula over the tiles that fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

__all__ = ["Problem", "Tile", "rank_tiles"]

# Static shared memory of a block.
SHARED_BYTES = 48 * 1024
MOST_REGISTERS = 224
# Bytes of the contraction that one step of the matrix units covers.
STEP_BYTES = 32
# Words between rows of sums on their way through shared memory, beyond the row: rows then begin in other banks.
STAGED_PAD = 8
# Shared memory that sums may take even if the pipeline needs less.
STAGED_BYTES = 18 * 1024


@dataclass(frozen=True)
class Tile:
    """The tile of a block.

    Attributes:
        rows: Pixels.
        columns: Output channels.
        depth: Bytes of the contraction per step of the pipeline.
        warps: How many warps share rows, columns and depth.
        stages: Steps of the pipeline that are under way or multiplied at a time.
    """

    rows: int
    columns: int
    depth: int
    warps: tuple[int, int, int]
    stages: int

    @property
    def threads(self) -> int:
        """Threads of the block."""
        return 32 * self.warps[0] * self.warps[1] * self.warps[2]

    @property
    def warp_rows(self) -> int:
        """Pixels of a warp."""
        return self.rows // self.warps[0]

    @property
    def warp_columns(self) -> int:
        """Output channels of a warp."""
        return self.columns // self.warps[1]

    @property
    def warp_steps(self) -> int:
        """Steps of the matrix units that a warp takes in one step of the pipeline."""
        return self.depth // (STEP_BYTES * self.warps[2])

    @property
    def staged_row(self) -> int:
        """Words of a row of sums on their way through shared memory."""
        return self.columns + STAGED_PAD

    def staged_bytes(self, parts: int) -> int:
        """Bytes of shared memory that sums take when they go through it in so many parts."""
        return self.rows // parts * self.staged_row * 4 * self.warps[2]

    def parts(self, pipeline: int) -> int:
        """In how many parts sums go through shared memory: as few as the pipeline's bytes, or a few more, let them."""
        blocks, room = self.warp_rows // 16, max(pipeline, STAGED_BYTES)
        return next(p for p in range(1, blocks + 1) if blocks % p == 0 and (p == blocks or self.staged_bytes(p) <= room))


@dataclass(frozen=True)
class Problem:
    """A matrix product.

    Attributes:
        rows: Pixels.
        columns: Output channels of a group.
        depth: Bytes of the contraction.
        groups: How many such products.
        move_bytes: Bytes that a thread brings into shared memory at a time.
        fragment_words: Registers that a word of a fragment takes: more than one where the compiler converts it first.
    """

    rows: int
    columns: int
    depth: int
    groups: int
    move_bytes: int
    fragment_words: int = 1


@dataclass(frozen=True)
class _Machine:
    """What the formula knows of a GPU; per multiprocessor and cycle.

    Attributes:
        processors: Multiprocessors.
        shared_bytes: Shared memory for blocks.
        products: Products of the matrix units times bytes of one.
        fetched: Bytes from the second cache.
        asynchronous: Copies into shared memory need no registers and no waiting.
    """

    processors: int
    shared_bytes: int
    products: int
    fetched: int = 40
    asynchronous: bool = True


_MACHINES = {
    "sm_75": _Machine(40, 64 * 1024, 1024, asynchronous=False),
    "sm_80": _Machine(108, 164 * 1024, 2048),
    "sm_86": _Machine(84, 100 * 1024, 1024),
    "sm_87": _Machine(16, 164 * 1024, 1024),
    "sm_89": _Machine(128, 100 * 1024, 1024),
    "sm_90": _Machine(132, 228 * 1024, 2560),
    "sm_100": _Machine(148, 228 * 1024, 2560),
    "sm_120": _Machine(170, 100 * 1024, 1024),
}
# Multiply-adds of a multiprocessor without its matrix units, times four bytes.
SCALAR_PRODUCTS = 4 * 128
# Cycles: a copy from global memory to arrive, a step of the pipeline even when all is there, a block's beginning and end,
# and what a multiprocessor loses to starting a block.
ARRIVAL, STEP, BLOCK, LAUNCH = 700, 90, 1500, 100
SHARED_RATE = 128
# Cycles of a multiprocessor per warp and step of the pipeline: where to fetch from, the barrier.
TURN = 12
# Cycles of a multiprocessor per move into shared memory by a warp: address, bounds, the copy.
MOVE = 10


@cache
def _tiles(matrix: bool) -> tuple[Tile, ...]:
    """Every tile worth considering."""
    return tuple(_every_tile(128 if matrix else 64))


def _every_tile(most_sums: int) -> Iterator[Tile]:
    for rows in (16, 32, 64, 128, 256):
        for columns in (16, 32, 48, 64, 96, 128):
            for warps in ((m, n, k) for m in (1, 2, 4) for n in (1, 2, 4) for k in (1, 2, 4, 8)):
                across, along = columns // warps[1], rows // warps[0]
                if rows % (16 * warps[0]) or columns % (16 * warps[1]) or across > 64 or along > 64:
                    continue
                count = warps[0] * warps[1] * warps[2]
                if not 2 <= count <= 8 or 32 * count < columns or along * across // 32 > most_sums:
                    continue
                yield from (
                    Tile(rows, columns, depth, warps, stages)
                    for depth in (32, 64, 128, 256)
                    for stages in (2, 3, 4)
                    if depth >= STEP_BYTES * warps[2]
                )


def _shared_bytes(tile: Tile, steps: int, nibbles: bool) -> int:
    weights = tile.columns * tile.depth
    pipeline = min(tile.stages, steps) * (tile.rows * tile.depth + (weights // 2 if nibbles else weights))
    return max(pipeline, tile.staged_bytes(tile.parts(pipeline))) + (weights if nibbles else 0)


def _registers(tile: Tile, problem: Problem) -> int:
    """About how many registers a thread needs: sums, fragments, places of the pixels it fetches, and the rest."""
    sums, places = tile.warp_rows * tile.warp_columns // 32, -(-tile.rows * tile.depth // (problem.move_bytes * tile.threads))
    fragments = (tile.warp_rows + tile.warp_columns) // 4
    return sums + problem.fragment_words * fragments + 3 * places + 32


def rank_tiles(problem: Problem, arch: str, matrix: bool, nibbles: bool) -> list[Tile]:
    """Every tile that fits, the least predicted time first.

    Args:
        problem: The product.
        arch: Such as 'sm_90'.
        matrix: The matrix units multiply, else ordinary instructions.
        nibbles: Weights are unpacked from 4 bits.
    """
    machine = _MACHINES[arch]
    costs = []
    for tile in _tiles(matrix):
        steps = -(-problem.depth // tile.depth)
        deeper = tile.stages > 2 and (steps < tile.stages or not machine.asynchronous)
        if deeper or (tile.depth > 32 and problem.depth <= tile.depth // 2) or _registers(tile, problem) > MOST_REGISTERS:
            continue
        shared = _shared_bytes(tile, steps, nibbles)
        if shared <= SHARED_BYTES and tile.rows * tile.depth // problem.move_bytes <= 16 * tile.threads:
            costs.append((_cost(tile, problem, machine, matrix, shared), tile))
    return [tile for _, tile in sorted(costs, key=lambda pair: (pair[0], pair[1].rows, pair[1].columns, -pair[1].stages))]


def _cost(tile: Tile, problem: Problem, machine: _Machine, matrix: bool, shared: int) -> float:
    """Predicted cycles.

    A multiprocessor holds several blocks at a time. Its busiest resource bounds it: multiplications, shared memory,
    fetching, moving. Nor is a round of blocks shorter than the latencies of one block.
    """
    blocks = -(-problem.rows // tile.rows) * -(-problem.columns // tile.columns) * problem.groups
    each = -(-blocks // machine.processors)
    resident = max(
        1, min(machine.shared_bytes // (shared + 1024), 65536 // (_registers(tile, problem) * tile.threads), 2048 // tile.threads)
    )
    steps = -(-problem.depth // tile.depth)
    warps = tile.threads // 32
    rate = machine.products if matrix else SCALAR_PRODUCTS
    # A warp keeps only one of four matrix units busy, and that only while it waits for nothing else.
    together = min(each, resident) * warps
    multiply = tile.rows * tile.columns * tile.depth / (rate * min(1.0, together / 4) * together / (together + 2))
    read = warps * (tile.warp_rows + tile.warp_columns) * tile.depth / tile.warps[2] / SHARED_RATE
    if not matrix:
        read *= 4
    fetch = (tile.rows + tile.columns) * tile.depth / machine.fetched
    move = MOVE * (tile.rows * tile.depth / problem.move_bytes + tile.columns * tile.depth / 16) / 128
    step = max(multiply, read, fetch, move) + 0.25 * (multiply + read + fetch + move) + TURN * warps
    waits = STEP + (ARRIVAL / (tile.stages - 1) if machine.asynchronous else ARRIVAL)
    # A store of every sum, and its way through shared memory.
    finish = tile.rows * tile.columns * (4 + 2 * tile.warps[2]) / 128
    turn = max(step / min(each, resident), waits if steps >= tile.stages else STEP) + 0.1 * waits
    alone = BLOCK + ARRIVAL + steps * turn + finish
    return max(each * (steps * step + finish), -(-each // resident) * alone) + LAUNCH * each
