"""Times of single kernels, taken inside running networks and kept beside the kernels.

A kernel alone in a loop finds everything in the cache and is up to a third faster than in a network. So kernels
are timed where they run: a few networks that together contain them all are run in turns, with the virtual
machine's instrument around every call, and without it.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from qsearch.build.link import CompiledModule
from qsearch.measure.latency import PAUSE_S
from qsearch.whole_files import write_whole

__all__ = ["KernelTimes", "time_kernels"]

# Files of times beside a kernel's others.
MIXED, UNIFORM = "time.json", "uniform_time.json"
# Raised whenever the same kernels would be given other times.
METHOD = 5
ROUNDS = 25
WARM_UP = 3
# Rounds that are left out at either end of what a call takes of its module.
TRIMMED = 3
# Passes of the median polish; after a few nothing moves any more.
PASSES = 20
# Of one module at a time: short ones are run several times, as trials are.
TURN_S = 5e-3
# No kernel is taken to be faster than this share of its time with the instrument.
LEAST_SHARE = 0.1
# What a clock can tell, seconds; a coarse one says 0.
LEAST_S = 1e-9


class KernelTimes:
    """Seconds per call by kernel symbol, on disk and in memory; those of another processor do not count.

    A kernel is a little slower among others of other precisions than in a network of one.

    Args:
        directory: The kernel cache.
        uniform: Whether what is put was timed in networks of one precision. Such times are kept apart; where a kernel has none,
            its time among others counts, but not the other way round.
    """

    def __init__(self, directory: Path, uniform: bool = False) -> None:
        self.directory, self.kinds = directory, (UNIFORM, MIXED) if uniform else (MIXED,)
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
            record = {"seconds": seconds, "processor": _processor(), "method": METHOD}
            with write_whole(self.directory / f"{symbol}.{self.kinds[0]}", durable=False) as stream:
                stream.write(json.dumps(record).encode())

    def _read(self, symbol: str) -> float | None:
        found = (self._seconds(self.directory / f"{symbol}.{kind}") for kind in self.kinds)
        return next((seconds for seconds in found if seconds is not None), None)

    def _seconds(self, path: Path) -> float | None:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            comparable = record["processor"] == _processor() and record["method"] == METHOD
            return float(record["seconds"]) if comparable else None
        except (OSError, ValueError, TypeError, KeyError):
            return None


def time_kernels(
    modules: Sequence[CompiledModule],
    image: np.ndarray,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Time every kernel of some modules inside them.

    Args:
        modules: Run in turns.
        image: float32 (N, C, H, W).
        threads: Threads the modules run on. On one thread it is its processor's time that counts, which leaves out
            when another process had the core.
        progress: Called with (rounds done, rounds in all).

    Returns:
        Symbol -> seconds per call, over the places where it is called the mean: its share of all calls of the module, less what
        the instrument takes, which is what the calls of a module last longer than the module does without it; times the
        seconds of the module. Neither depends on how fast the machine was just then, which may double within seconds: a
        share is taken within a turn, and modules are compared within rounds.
    """
    runs = [_Instrumented(module, image, time.thread_time if threads == 1 else time.perf_counter) for module in modules]
    times: list[list[np.ndarray]] = [[] for _ in runs]
    for i in range(WARM_UP + ROUNDS):
        progress(i, WARM_UP + ROUNDS)
        for run, seen in zip(runs, times, strict=True):
            found = run.turn()
            if i >= WARM_UP:
                seen.append(found)
    progress(WARM_UP + ROUNDS, WARM_UP + ROUNDS)
    if not runs:
        return {}
    excess, places = _excess(times), dict[str, list[float]]()
    for run, seen, whole in zip(runs, times, _wholes(times), strict=True):
        calls = np.array(seen)[:, 1:]
        calls = np.maximum(calls - excess, np.maximum(LEAST_SHARE * calls, LEAST_S))
        shares = np.sort(calls / calls.sum(axis=1, keepdims=True), axis=0)[TRIMMED:-TRIMMED].mean(axis=0)
        for symbol, share in zip(run.symbols, shares / shares.sum(), strict=True):
            places.setdefault(symbol, []).append(float(whole * share))
    return {symbol: float(np.mean(found)) for symbol, found in places.items()}


def _wholes(times: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Seconds of one inference of every module without the instrument, float64 (modules,).

    By median polish (Tukey 1977, "Exploratory data analysis", chapter 11): a factor for every module and one for every round, in
    which all modules find the machine about as fast.
    """
    logs = np.log(np.maximum([[turn[0] for turn in seen] for seen in times], LEAST_S))
    modules = np.zeros((len(logs), 1))
    for _ in range(PASSES):
        rounds = np.median(logs - modules, axis=0, keepdims=True)
        modules = np.median(logs - rounds, axis=1, keepdims=True)
    return np.exp(modules[:, 0] + np.median(logs - modules))


def _excess(times: Sequence[Sequence[np.ndarray]]) -> float:
    """Seconds that the instrument adds to a call: the median over all turns, in which both ways are disturbed alike."""
    found = [(turn[1:].sum() - turn[0]) / max(len(turn) - 1, 1) for seen in times for turn in seen]
    return max(float(np.median(found)), 0.0)


class _Instrumented:
    """A module that notes the time of each of its kernel calls."""

    def __init__(self, module: CompiledModule, image: np.ndarray, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.plain, self.machine = module.open(), module.open()
        self.given = self.plain.tensor(image)
        self.machine.set_instrument(self._mark)
        self.function = self.machine["main"]
        self.wanted = {kernel.symbol for kernel in module.kernels}
        self.symbols: list[str] = []
        self.seconds: list[float] = []
        self.start = 0.0
        self.number = max(1, round(TURN_S / max(self._whole(1), 1e-6)))

    def _mark(self, function: Any, name: str, before: bool, result: Any, *arguments: Any) -> int:
        if name not in self.wanted:
            return 0
        if before:
            self.start = self.clock()
        else:
            self.seconds.append(self.clock() - self.start)
            self.symbols.append(name)
        return 0

    def _whole(self, number: int) -> float:
        """Seconds of one inference without the instrument, as the mean of a number of them and one more."""
        evaluator = self.plain.time_evaluator("main", self.plain.place, number=number, repeat=1)
        start = self.clock()
        # The loop runs inside TVM, free of Python; before it counts it runs once.
        evaluator(self.given)
        return (self.clock() - start) / (number + 1)

    def turn(self) -> np.ndarray:
        """Run for a while, first without the instrument: by then caches hold of this module what they can.

        Returns:
            float64 (1 + calls,): seconds of one inference without the instrument, then those of each call.
        """
        time.sleep(PAUSE_S)
        whole, calls = self._whole(self.number), []
        time.sleep(PAUSE_S)
        for _ in range(self.number):
            self.symbols, self.seconds = [], []
            self.function(self.given)
            calls.append(self.seconds)
        return np.array([whole, *np.mean(calls, axis=0)])


@cache
def _processor() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        models = {line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "CPU part"))}
        return "; ".join(sorted(models)) or platform.processor()
    except OSError:
        return platform.processor()
