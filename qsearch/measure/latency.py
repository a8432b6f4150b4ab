"""Latency: how long one inference of a compiled module takes, alone on the machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qsearch.measure.measurement import Latency

__all__ = ["MOST_SPREAD", "TimingSettings", "first_images", "measure_latency", "measure_paired", "middle_of"]

# Half the interquartile range of the paired ratios, as a share of their median, above which they are noise. At 21
# repeats the standard error of the median is then 4 %: 1.25 sigma / sqrt(n), with sigma 1.48 times the half range.
MOST_SPREAD = 0.10
LONGER = 3
# Slept before each repeat of a pair. On a core that something else runs on as well, a process that has just slept starts
# on a fresh slice of time; without that the slices fall into step with the turns, and always hit the same one of the two.
PAUSE_S = 2e-3


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


def first_images(images: np.ndarray, batch: int) -> np.ndarray:
    """What one inference is timed on, float32 (batch, C, H, W): the first images, and from the start again where they are few.

    Args:
        images: float32 (N, C, H, W).
        batch: Images of one inference.
    """
    return images[np.arange(batch) % len(images)]


def measure_latency(machine: Any, image: np.ndarray, settings: TimingSettings = TimingSettings(), threads: int = 1) -> Latency:
    """Time one module.

    Args:
        machine: A Relax virtual machine.
        image: float32 (N, C, H, W).
        settings: How long to time.
        threads: Threads the module was compiled for.
    """
    (timer,) = _time([machine], image, settings, threads)
    return timer.result(_threads_used(threads))


def measure_paired(
    reference: Any,
    machines: Sequence[Any],
    image: np.ndarray,
    reference_ms: float,
    settings: TimingSettings = TimingSettings(),
    threads: int = 1,
) -> list[Latency]:
    """Time modules in turns with a reference module, and tell their latencies on the reference's clock.

    The clock of a shared machine moves by a tenth to a third within minutes, so that milliseconds of two trials some
    minutes apart cannot be compared. What moves the module moves the reference beside it alike: the ratio of the two,
    taken within each round, stays. Its median times `reference_ms`, which is the same for all, is the latency.
    Every module has its rounds with the reference alone: among many, each would find its weights further away in the
    caches, the reference no less, and the ratio would depend on how many there are.
    If the ratios of a module spread further than MOST_SPREAD, it is timed once more, for longer.

    Args:
        reference: Relax virtual machine of the reference module.
        machines: Relax virtual machines to time.
        image: float32 (N, C, H, W).
        reference_ms: The reference module's latency, milliseconds, measured once for all that shall be comparable.
        settings: How long to time; the reference is timed as long as every module.
        threads: Threads the modules were compiled for.

    Returns:
        A latency per machine; `noisy` where the longer try spread too far as well.
    """
    found = []
    for machine in machines:
        one = _pair(reference, machine, image, settings, threads)
        if one.noisy:
            one = _pair(reference, machine, image, replace(settings, repeats=LONGER * settings.repeats), threads)
        found.append(replace(one, median_ms=one.median_ms * reference_ms, spread_ms=one.spread_ms * reference_ms))
    return found


def middle_of(timings: Sequence[Latency]) -> Latency:
    """The middle one of several timings of a module, the noisy ones left out where there are others."""
    quiet = [one for one in timings if not one.noisy] or timings
    return sorted(quiet, key=lambda one: one.median_ms)[len(quiet) // 2]


def _pair(reference: Any, machine: Any, image: np.ndarray, settings: TimingSettings, threads: int) -> Latency:
    """A latency in units of the reference's."""
    first, timer = _time([reference, machine], image, settings, threads, PAUSE_S)
    low, ratio, high = (float(value) for value in np.percentile(np.divide(timer.samples, first.samples), [25, 50, 75]))
    spread, raw = (high - low) / 2, timer.result(_threads_used(threads))
    paired = replace(raw, median_ms=ratio, spread_ms=spread, ratio=ratio, raw_ms=raw.median_ms)
    return replace(paired, noisy=spread > MOST_SPREAD * ratio)


def _time(
    machines: Sequence[Any], image: np.ndarray, settings: TimingSettings, threads: int, pause_s: float = 0.0
) -> list[_Timer]:
    """Timers that have run, one repeat of each per round."""
    timers = [_Timer(machine, machine.tensor(image), settings, threads) for machine in machines]
    for timer in timers:
        timer.warm_up()
    for _ in range(settings.repeats):
        for timer in timers:
            if pause_s:
                time.sleep(pause_s)
            timer.repeat()
    return timers


def _threads_used(threads: int) -> int:
    """As many of the threads that a module was compiled for as the pool of the calling thread has."""
    import tvm

    return 1 if threads == 1 else min(threads, int(tvm.get_global_func("runtime.NumThreads")()))


class _Timer:
    """Repeats of one module; the loop over inferences runs inside TVM, free of Python."""

    def __init__(self, machine: Any, image: Any, settings: TimingSettings, threads: int) -> None:
        self.machine, self.image, self.settings, self.threads = machine, image, settings, threads
        # A machine elsewhere, or a GPU, takes none of this thread's time.
        self.own_clock = threads == 1 and machine.on_cpu
        self.number = 1
        self.samples: list[float] = []
        self._timed: dict[int, Any] = {}

    def warm_up(self) -> None:
        """Run until warm, then fix the number of inferences per repeat."""
        once = self._seconds(1)
        count = max(1, int(self.settings.warmup_ms / 1e3 / max(once, 1e-6)))
        once = self._seconds(count)
        self.number = max(1, round(self.settings.repeat_ms / 1e3 / max(once, 1e-7)))

    def repeat(self) -> None:
        """Time one repeat.

        On one thread by that thread's own clock, which stands still while something else has the processor: a module that
        had to wait for it is no slower. Waits also fall into step with the turns, and would disturb one module of a pair
        and not the other. Threads of a pool wait for each other, and only the clock on the wall sees that. A GPU has a clock
        of its own, which TVM reads.
        """
        own = time.thread_time()
        seconds = self._seconds(self.number)
        # TVM runs once more before it counts.
        own = (time.thread_time() - own) / (self.number + 1)
        self.samples.append(own if self.own_clock else seconds)

    def result(self, threads: int) -> Latency:
        """Median and half the interquartile range."""
        low, middle, high = np.percentile(np.array(self.samples) * 1e3, [25, 50, 75])
        return Latency(float(middle), float((high - low) / 2), len(self.samples), self.number, threads)

    def _seconds(self, number: int) -> float:
        # Made once: beside a busy thread of this process every step of Python may have to wait.
        if number not in self._timed:
            self._timed[number] = self.machine.time_evaluator("main", self.machine.place, number=number, repeat=1)
        return float(self._timed[number](self.image).results[0])
