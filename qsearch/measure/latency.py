"""Latency: how long one inference of a compiled module takes, alone on the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qsearch.measure.measurement import Latency

__all__ = ["TimingSettings", "measure_interleaved", "measure_latency"]


@dataclass(frozen=True)
class TimingSettings:
    """How long to time.

    Attributes:
        warmup_ms: Time spent running before anything is counted.
        repeat_ms: Time of one repeat; a repeat is the mean of as many inferences as fit.
        repeats: Repeats; the median and the spread are taken over them.
    """

    warmup_ms: float = 20.0
    repeat_ms: float = 5.0
    repeats: int = 21


def measure_latency(machine: Any, image: np.ndarray, settings: TimingSettings = TimingSettings(), threads: int = 1) -> Latency:
    """Time one module.

    Args:
        machine: A Relax virtual machine.
        image: float32 (N, C, H, W).
        settings: How long to time.
        threads: Threads the module was compiled for.
    """
    return measure_interleaved([machine], image, settings, threads)[0]


def measure_interleaved(
    machines: Sequence[Any], image: np.ndarray, settings: TimingSettings = TimingSettings(), threads: int = 1
) -> list[Latency]:
    """Time several modules in turns, one repeat of each per round, so that drift meets all of them alike.

    Args:
        machines: Relax virtual machines.
        image: float32 (N, C, H, W).
        settings: How long to time.
        threads: Threads the modules were compiled for.

    Returns:
        A latency per machine.
    """
    import tvm

    given = tvm.runtime.tensor(np.ascontiguousarray(image))
    timers = [_Timer(machine, given, settings) for machine in machines]
    for timer in timers:
        timer.warm_up()
    for _ in range(settings.repeats):
        for timer in timers:
            timer.repeat()
    used = _threads_used(threads)
    return [timer.result(used) for timer in timers]


def _threads_used(threads: int) -> int:
    """As many of the threads that a module was compiled for as the pool of the calling thread has."""
    import tvm

    return 1 if threads == 1 else min(threads, int(tvm.get_global_func("runtime.NumThreads")()))


class _Timer:
    """Repeats of one module; the loop over inferences runs inside TVM, free of Python."""

    def __init__(self, machine: Any, image: Any, settings: TimingSettings) -> None:
        self.machine, self.image, self.settings = machine, image, settings
        self.number = 1
        self.samples: list[float] = []

    def warm_up(self) -> None:
        """Run until warm, then fix the number of inferences per repeat."""
        once = self._seconds(1)
        count = max(1, int(self.settings.warmup_ms / 1e3 / max(once, 1e-6)))
        once = self._seconds(count)
        self.number = max(1, round(self.settings.repeat_ms / 1e3 / max(once, 1e-7)))

    def repeat(self) -> None:
        """Time one repeat."""
        self.samples.append(self._seconds(self.number))

    def result(self, threads: int) -> Latency:
        """Median and half the interquartile range."""
        low, middle, high = np.percentile(np.array(self.samples) * 1e3, [25, 50, 75])
        return Latency(float(middle), float((high - low) / 2), len(self.samples), self.number, threads)

    def _seconds(self, number: int) -> float:
        import tvm

        timed = self.machine.time_evaluator("main", tvm.cpu(), number=number, repeat=1)(self.image)
        return float(timed.results[0])
