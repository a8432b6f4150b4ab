"""Latencies on the reference's clock: drift cancels, noise is tried again and then said."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qsearch.measure import latency
from qsearch.measure.latency import MOST_SPREAD, TimingSettings, measure_latency, measure_paired
from qsearch.search.front import measurement_from_json

IMAGE, SETTINGS = np.zeros((1, 1, 4, 4), np.float32), TimingSettings(1.0, 1.0, 21)


class Clock:
    """What time is multiplied by on a shared machine, from one timing to the next; it stands in for the thread's."""

    def __init__(self, factor: Callable[[int], float]) -> None:
        self.factor, self.timings, self.now = factor, 0, 0.0
        latency.time = SimpleNamespace(thread_time=lambda: self.now, sleep=lambda seconds: None)  # type: ignore[attr-defined]

    def machine(self, milliseconds: float) -> Any:
        """A virtual machine whose inference takes so long where the factor is 1."""

        def evaluator(name: str, device: Any, number: int, repeat: int) -> Callable[[Any], SimpleNamespace]:
            def timed(image: Any) -> SimpleNamespace:
                self.timings += 1
                seconds = milliseconds * 1e-3 * self.factor(self.timings)
                self.now += (number + 1) * seconds
                # By the clock on the wall another process has had the core for as long.
                return SimpleNamespace(results=[2 * seconds])

            return timed

        return SimpleNamespace(time_evaluator=evaluator, tensor=lambda image: image, place=None, on_cpu=True)


@pytest.fixture(autouse=True)
def own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a clock puts in its place, the module's time comes back."""
    monkeypatch.setattr(latency, "time", latency.time)


def test_on_several_threads_the_wall_counts() -> None:
    clock = Clock(lambda timing: 1.0)
    assert measure_latency(clock.machine(1.0), IMAGE, SETTINGS).median_ms == pytest.approx(1.0)
    assert measure_latency(clock.machine(1.0), IMAGE, SETTINGS, threads=2).median_ms == pytest.approx(2.0)


def test_drift_cancels() -> None:
    clock = Clock(lambda timing: 1.0 + 0.3 * timing / 100)
    reference, module = clock.machine(4.0), clock.machine(1.0)
    early = measure_paired(reference, [module], IMAGE, 4.0, SETTINGS)[0]
    clock.timings += 500
    late = measure_paired(reference, [module], IMAGE, 4.0, SETTINGS)[0]
    assert early.median_ms == pytest.approx(1.0, rel=0.01)
    assert late.median_ms == pytest.approx(early.median_ms, rel=0.01)
    assert late.raw_ms is not None and early.raw_ms is not None
    # The time it took has more than doubled.
    assert late.raw_ms > 2 * early.raw_ms
    assert late.ratio == pytest.approx(late.median_ms / 4.0)
    assert (late.repeats, late.noisy) == (21, False)
    assert measure_latency(module, IMAGE, SETTINGS).ratio is None


def test_the_reference_is_one_for_all() -> None:
    clock = Clock(lambda timing: 1.0)
    found = measure_paired(clock.machine(4.0), [clock.machine(1.0), clock.machine(6.0)], IMAGE, 10.0, SETTINGS)
    assert [one.median_ms for one in found] == pytest.approx([2.5, 15.0])
    assert [one.raw_ms for one in found] == pytest.approx([1.0, 6.0])


def test_a_ratio_does_not_depend_on_what_else_is_timed() -> None:
    """What ran since a module's last turn has pushed its weights out of the caches; the larger has more to fetch."""
    turns: list[str] = []

    def cost(name: str, warm_ms: float, cold_ms: float) -> Any:
        clock = Clock(lambda timing: 1.0)
        warm, cold = clock.machine(warm_ms), clock.machine(warm_ms + cold_ms)

        def evaluator(*arguments: Any, **settings: Any) -> Callable[[Any], Any]:
            fast, slow = (machine.time_evaluator(*arguments, **settings) for machine in (warm, cold))

            def timed(image: Any) -> Any:
                since = set(turns[len(turns) - turns[::-1].index(name) :]) if name in turns else set()
                turns.append(name)
                return (slow if len(since) > 1 else fast)(image)

            return timed

        latency.time = clock_time  # type: ignore[attr-defined]
        clocks.append(clock)
        return SimpleNamespace(time_evaluator=evaluator, tensor=lambda image: image, place=None, on_cpu=True)

    clocks: list[Clock] = []
    clock_time = SimpleNamespace(thread_time=lambda: sum(one.now for one in clocks), sleep=lambda seconds: None)
    reference, modules = cost("float", 4.0, 4.0), [cost(name, 1.0, 0.2) for name in ("a", "b", "c")]
    (alone,) = measure_paired(reference, modules[:1], IMAGE, 4.0, SETTINGS)
    among_others = measure_paired(reference, modules, IMAGE, 4.0, SETTINGS)
    assert alone.ratio == pytest.approx(0.25)
    assert [one.ratio for one in among_others] == pytest.approx([0.25] * 3)


def test_noise_is_tried_again_for_longer_and_then_marked() -> None:
    rng = np.random.default_rng(0)
    always = Clock(lambda timing: float(np.exp(rng.normal(0.0, 0.5))))
    (found,) = measure_paired(always.machine(4.0), [always.machine(1.0)], IMAGE, 4.0, SETTINGS)
    assert found.noisy
    assert found.repeats == 63
    assert found.spread_ms > MOST_SPREAD * found.median_ms
    passing = Clock(lambda timing: float(np.exp(rng.normal(0.0, 0.5))) if timing < 46 else 1.0)
    (found,) = measure_paired(passing.machine(4.0), [passing.machine(1.0)], IMAGE, 4.0, SETTINGS)
    assert (found.noisy, found.repeats) == (False, 63)
    assert found.median_ms == pytest.approx(1.0)


def test_trials_measured_before_there_were_ratios_are_read() -> None:
    timing = {"median_ms": 1.5, "spread_ms": 0.1, "repeats": 21, "number": 3}
    memory = {"weight_bytes": 1, "activation_bytes": 2, "workspace_bytes": 3}
    accuracy = {"top1": 90.0, "top5": 99.0, "top1_loss_pp": 0.5, "top1_loss_ci_pp": [0.0, 1.0], "images": 10, "output_sha256": ""}
    old = measurement_from_json({"latency": timing, "memory": memory, "accuracy": accuracy})
    assert (old.latency.median_ms, old.latency.ratio, old.latency.raw_ms, old.latency.noisy) == (1.5, None, None, False)
