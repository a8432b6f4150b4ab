"""Times of single kernels, taken inside running networks and kept beside the kernels.

A kernel alone in a loop finds everything in the cache and is up to a third faster than in a network. So kernels
are timed where they run: a few networks that together contain them all are run in turns, with the virtual
machine's instrument around every call.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from qsearch.build.link import CompiledModule

__all__ = ["KernelTimes", "time_kernels"]

ROUNDS = 25
WARM_UP = 3
# The lower quartile over rounds: other processes only ever add time.
QUANTILE = 0.25


class KernelTimes:
    """Seconds per call by kernel symbol, on disk and in memory; those of another processor do not count.

    Args:
        directory: The kernel cache.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._known: dict[str, float | None] = {}

    def get(self, symbol: str) -> float | None:
        """Seconds of one call; None where it was not measured, or the record cannot be read."""
        if symbol not in self._known:
            self._known[symbol] = self._read(symbol)
        return self._known[symbol]

    def put(self, times: Mapping[str, float]) -> None:
        """Remember times."""
        for symbol, seconds in times.items():
            self._known[symbol] = seconds
            scratch = self.directory / f".time-{symbol}-{os.getpid()}"
            scratch.write_text(json.dumps({"seconds": seconds, "processor": _processor()}), encoding="utf-8")
            os.replace(scratch, self._path(symbol))

    def _path(self, symbol: str) -> Path:
        return self.directory / f"{symbol}.time.json"

    def _read(self, symbol: str) -> float | None:
        try:
            record = json.loads(self._path(symbol).read_text(encoding="utf-8"))
            return float(record["seconds"]) if record["processor"] == _processor() else None
        except (OSError, ValueError, TypeError, KeyError):
            return None


def time_kernels(
    modules: Sequence[CompiledModule], image: np.ndarray, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, float]:
    """Time every kernel of some modules inside them.

    Args:
        modules: Run in turns.
        image: float32 (N, C, H, W).
        progress: Called with (rounds done, rounds in all).

    Returns:
        Symbol -> seconds per call: over rounds the lower quartile, over the places where it is called the mean.
    """
    import tvm

    runs = [_Instrumented(module) for module in modules]
    given = tvm.runtime.tensor(np.ascontiguousarray(image))
    times: list[list[list[float]]] = [[] for _ in runs]
    for i in range(WARM_UP + ROUNDS):
        progress(i, WARM_UP + ROUNDS)
        for run, seen in zip(runs, times, strict=True):
            found = run(given)
            if i >= WARM_UP:
                seen.append(found)
    progress(WARM_UP + ROUNDS, WARM_UP + ROUNDS)
    places: dict[str, list[float]] = {}
    for run, seen in zip(runs, times, strict=True):
        for symbol, seconds in zip(run.symbols, np.quantile(np.array(seen), QUANTILE, axis=0), strict=True):
            places.setdefault(symbol, []).append(float(seconds))
    return {symbol: float(np.mean(found)) for symbol, found in places.items()}


class _Instrumented:
    """A module that notes the time of each of its kernel calls."""

    def __init__(self, module: CompiledModule) -> None:
        self.machine = module.open()
        self.machine.set_instrument(self._mark)
        self.function = self.machine["main"]
        self.wanted = {kernel.symbol for kernel in module.kernels}
        self.symbols: list[str] = []
        self.seconds: list[float] = []
        self.start = 0.0

    def _mark(self, function: Any, name: str, before: bool, result: Any, *arguments: Any) -> int:
        if name not in self.wanted:
            return 0
        if before:
            self.start = time.perf_counter()
        else:
            self.seconds.append(time.perf_counter() - self.start)
            self.symbols.append(name)
        return 0

    def __call__(self, given: Any) -> list[float]:
        self.symbols, self.seconds = [], []
        self.function(given)
        return self.seconds


@cache
def _processor() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        models = {line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "CPU part"))}
        return "; ".join(sorted(models)) or platform.processor()
    except OSError:
        return platform.processor()
