"""Time a few register tiles per distinct kernel and remember the fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from qsearch.build.cache import kernel_symbol
from qsearch.build.link import Linker
from qsearch.build.machine import on_device
from qsearch.build.target import Tile
from qsearch.quantize.program import Op, Program

__all__ = ["TunedKernel", "tune_programs"]

CANDIDATES = 6
ROUNDS = 7
SECONDS_PER_ROUND = 2e-3
# A candidate must beat the predicted tile by this much: less is within the noise of a shared machine.
LEAST_GAIN = 1.03


@dataclass(frozen=True)
class TunedKernel:
    """What tuning one kernel found.

    Attributes:
        op: A layer that uses it.
        precision: The precision it runs in.
        predicted: The tile of the cost formula.
        chosen: The fastest.
        gain: Time of the predicted tile over that of the chosen one.
    """

    op: str
    precision: str
    predicted: Tile
    chosen: Tile
    gain: float


def tune_programs(
    linker: Linker, programs: Iterable[Program], seconds: float, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[TunedKernel]:
    """Tune every distinct dense convolution and linear layer that has no remembered tile, the costliest first.

    Args:
        linker: Remembers the tiles, in the kernel cache it compiles into.
        programs: The programs whose kernels are tuned.
        seconds: No kernel is begun after this time.
        progress: Called with (kernels done, kernels in all) before every kernel and at the end.

    Returns:
        A record for every kernel that was tuned.
    """
    todo: dict[str, Op] = {}
    for program in programs:
        for op in program.ops:
            if op.key.kind == "conv2d" and linker.tiles.get(op.key) is None and len(_tiles(linker, op)) > 1:
                todo.setdefault(linker.tiles.name(op.key), op)
    ops = sorted(todo.values(), key=lambda op: -_multiplications(op))
    end, found = time.monotonic() + seconds, []
    for i, op in enumerate(ops):
        progress(i, len(ops))
        if time.monotonic() > end:
            break
        found.append(_tune(linker, op))
    progress(len(found), len(ops))
    return found


def _tiles(linker: Linker, op: Op) -> Sequence[Tile]:
    return linker.target.candidate_tiles(op.key, CANDIDATES)


def _multiplications(op: Op) -> int:
    return int(np.prod(op.key.shapes[-1])) * int(np.prod(op.constants["weight"].shape[1:]))


def _tune(linker: Linker, op: Op) -> TunedKernel:
    """Time the candidates in turns; the least median wins."""
    tiles = _tiles(linker, op)
    runs = _runs(linker, op, tiles)
    once = max(run(1) for run in runs)
    number = max(1, int(SECONDS_PER_ROUND / once))
    times = np.array([[run(number) for run in runs] for _ in range(ROUNDS)])
    medians = np.median(times, 0)
    best = int(np.argmin(medians))
    gain = float(medians[0] / medians[best])
    if gain < LEAST_GAIN:
        best, gain = 0, 1.0
    linker.remember_tile(op.key, tiles[best])
    return TunedKernel(op.name, op.key.precision or "", tiles[0], tiles[best], gain)


def _runs(linker: Linker, op: Op, tiles: Sequence[Tile]) -> list[Callable[[int], float]]:
    """One function per tile: number of calls -> seconds per call, on random values of the operation's dtypes."""
    target = linker.target
    kernels = [target.describe(op.key, tile) for tile in tiles]
    symbols = [kernel_symbol(kernel, target) for kernel in kernels]
    compiled = linker.cache.get(zip(symbols, kernels, strict=True))
    rng = np.random.default_rng(0)
    values = [
        rng.integers(0, 128, int(np.prod(shape))).astype(dtype) for shape, dtype in zip(op.key.shapes, op.key.dtypes, strict=True)
    ]
    tensors = [on_device(value, target.device) for value in values]
    runs: list[Callable[[int], float]] = []
    for kernel, symbol in zip(kernels, symbols, strict=True):
        assert kernel.pack_weight is not None
        constants = (kernel.pack_weight(op.constants), *kernel.pack(op.constants))
        arguments = [*tensors[:-1], *(on_device(a, target.device) for a in constants), tensors[-1]]
        runs.append(partial(_seconds, compiled[symbol].library, symbol, target.device, arguments))
    return runs


def _seconds(library: Any, symbol: str, device: str, arguments: list[Any], number: int) -> float:
    import tvm

    return float(library.time_evaluator(symbol, tvm.device(device, 0), number=number, repeat=1)(*arguments).results[0])
