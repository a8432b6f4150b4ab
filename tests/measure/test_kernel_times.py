"""Times of kernels inside modules, over a machine whose clock is known; and on disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qsearch.measure import kernel_times
from qsearch.measure.kernel_times import KernelTimes, time_kernels

SECONDS = {"conv": 50e-6, "depthwise": 20e-6, "convert": 4e-6}
# What the instrument adds to every call.
EXCESS = 3e-6


class Clock(SimpleNamespace):
    """Runs ahead by a factor of what it is put forward by."""

    factor, elapsed = 1.0, 0.0

    @property
    def now(self):
        return self.elapsed

    @now.setter
    def now(self, value):
        self.elapsed += self.factor * (value - self.elapsed)


class Machine:
    """A virtual machine that calls kernels in order; only its own clock moves."""

    def __init__(self, clock: SimpleNamespace, calls: list[str], excess: float) -> None:
        self.clock, self.calls, self.mark, self.excess = clock, calls, None, excess

    place, on_cpu = None, True

    def tensor(self, array):
        return array

    def set_instrument(self, mark):
        self.mark = mark

    def __getitem__(self, name):
        return self.run

    def time_evaluator(self, name, device, number, repeat):
        def run(given):
            # It runs once before it counts.
            self.clock.now += (number + 1) * sum(SECONDS[call] for call in self.calls)

        return run

    def run(self, given):
        for call in self.calls:
            self.mark(None, "vm.builtin.reshape", True, None)
            self.mark(None, call, True, None)
            self.clock.now += SECONDS[call] + self.excess
            self.mark(None, call, False, None)


def module(clock, *calls, excess=EXCESS):
    kernels = tuple(SimpleNamespace(symbol=name) for name in dict.fromkeys(calls))
    return SimpleNamespace(open=lambda: Machine(clock, list(calls), excess), kernels=kernels)


@pytest.mark.parametrize("threads, name", [(1, "thread_time"), (2, "perf_counter")])
def test_what_the_instrument_takes_is_not_the_kernels(monkeypatch: pytest.MonkeyPatch, threads: int, name: str) -> None:
    clock = SimpleNamespace(now=0.0)
    still = {"thread_time": lambda: 0.0, "perf_counter": lambda: 0.0, "sleep": lambda seconds: None}
    monkeypatch.setattr(kernel_times, "time", SimpleNamespace(**still | {name: lambda: clock.now}))
    seen: list[tuple[int, int]] = []
    modules = [module(clock, "conv", "depthwise", "conv"), module(clock, "conv", "convert", "depthwise", "convert")]
    found = time_kernels(modules, np.zeros((1, 3, 4, 4), np.float32), threads, lambda done, total: seen.append((done, total)))
    assert found == {name: pytest.approx(seconds, rel=1e-6) for name, seconds in SECONDS.items()}
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] == len(seen) - 1
    assert time_kernels([], np.zeros((1, 3, 4, 4), np.float32)) == {}


def test_kernels_last_as_long_as_their_modules_wherever_the_instrument_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    still = {"thread_time": lambda: clock.now, "sleep": lambda seconds: None}
    monkeypatch.setattr(kernel_times, "time", SimpleNamespace(**still))
    calls = ["conv", "conv"], ["depthwise"], ["convert"]
    modules = [module(clock, *one, excess=EXCESS * (1 + i)) for i, one in enumerate(calls)]
    found = time_kernels(modules, np.zeros((1, 3, 4, 4), np.float32))
    assert found == {name: pytest.approx(SECONDS[name], rel=1e-6) for name in ("conv", "depthwise", "convert")}


@pytest.mark.parametrize("seed", range(6))
def test_how_fast_the_machine_is_just_then_does_not_count(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """It is nearly twice as slow some of the time, for seconds each, and now and then something interrupts it."""
    clock, rng, slow = Clock(), np.random.default_rng(seed), [1.0]

    def sleep(seconds):
        # Twice in every turn.
        if rng.random() < 0.03:
            slow[0] = float(rng.choice([1.0, 1.8]))
        clock.factor = slow[0] * float(np.exp(rng.normal(0, 0.02))) * (3.0 if rng.random() < 0.05 else 1.0)

    monkeypatch.setattr(kernel_times, "time", SimpleNamespace(thread_time=lambda: clock.now, sleep=sleep))
    calls = ["conv", "depthwise", "conv"], ["depthwise", "convert"], ["convert", "conv", "depthwise"]
    modules = [module(clock, *one, excess=0.0) for one in calls for _ in range(4)]
    found = time_kernels(modules, np.zeros((1, 3, 4, 4), np.float32))
    for name, seconds in SECONDS.items():
        assert found[name] / found["conv"] == pytest.approx(seconds / SECONDS["conv"], rel=0.025)


def test_a_clock_too_coarse_for_kernels_tells_finite_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_times, "time", SimpleNamespace(thread_time=lambda: 0.0, sleep=lambda seconds: None))
    found = time_kernels([module(SimpleNamespace(now=0.0), "conv", "convert")], np.zeros((1, 3, 4, 4), np.float32))
    assert set(found) == {"conv", "convert"}
    assert all(0 <= seconds < 1e-8 for seconds in found.values())


def test_times_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KernelTimes(tmp_path).put({"a": 1e-5, "b": 2e-5})
    assert KernelTimes(tmp_path).get("a") == 1e-5
    assert KernelTimes(tmp_path).get("c") is None
    (tmp_path / "b.time.json").write_text("{")
    assert KernelTimes(tmp_path).get("b") is None
    # In a network of one precision a kernel may be faster; that is no news of others.
    KernelTimes(tmp_path, uniform=True).put({"d": 3e-5})
    assert KernelTimes(tmp_path, uniform=True).get("d") == 3e-5 and KernelTimes(tmp_path).get("d") is None
    KernelTimes(tmp_path).put({"d": 4e-5})
    assert KernelTimes(tmp_path, uniform=True).get("d") == 3e-5 and KernelTimes(tmp_path).get("d") == 4e-5
    assert KernelTimes(tmp_path, uniform=True).get("a") == 1e-5
    # Another processor's are not this one's.
    monkeypatch.setattr(kernel_times, "_processor", lambda: "another")
    assert KernelTimes(tmp_path).get("a") is None
