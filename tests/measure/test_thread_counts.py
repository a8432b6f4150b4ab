"""Modules on several threads: no more of them at a time than there are processors, and the record says how many."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tvm

from qsearch.build import machine as real
from qsearch.measure.accuracy import run_batches, run_images
from qsearch.measure.latency import TimingSettings, measure_latency, measure_paired


class Machine(dict[str, Any]):
    """Stands in for a virtual machine: gives the mean of its image, in a microsecond."""

    place, on_cpu = None, True
    outputs = real.Machine.outputs

    def __init__(self) -> None:
        self.callers: set[int] = set()
        super().__init__(main=self.run)

    def run(self, image: Any) -> Any:
        self.callers.add(threading.get_ident())
        return tvm.runtime.tensor(image.numpy().mean((1, 2, 3), keepdims=True).reshape(-1, 1))

    def tensor(self, array: np.ndarray) -> Any:
        return tvm.runtime.tensor(np.ascontiguousarray(array))

    def time_evaluator(self, name: str, device: Any, number: int, repeat: int) -> Any:
        return lambda image: SimpleNamespace(results=[1e-6] * repeat)


@pytest.mark.parametrize(("threads", "workers"), [(1, 8), (2, 4), (3, 2), (8, 1), (9, 1)])
def test_workers_share_the_processors_between_their_threads(threads: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    images, opened, all_there = np.random.default_rng(0).random((24, 1, 4, 4), np.float32), [], threading.Barrier(workers)

    def open_machine() -> Machine:
        all_there.wait(60)
        opened.append(Machine())
        return opened[-1]

    logits = run_images(open_machine, images, threads=threads)
    assert len(opened) == workers
    assert all(len(machine.callers) == 1 for machine in opened)
    np.testing.assert_array_equal(logits[:, 0], images.mean((1, 2, 3)))


@pytest.mark.parametrize(("count", "batch"), [(5, 1), (6, 3), (7, 3), (2, 4)])
def test_images_that_are_no_multiple_of_the_batch_are_run_in_the_calling_thread(count: int, batch: int) -> None:
    images, machine = np.random.default_rng(0).random((count, 1, 4, 4), np.float32), Machine()
    logits = run_batches(machine, images, batch)
    assert logits.shape == (count, 1) and machine.callers == {threading.get_ident()}
    np.testing.assert_array_equal(logits[:, 0], images.mean((1, 2, 3)))


@pytest.mark.parametrize(("compiled_for", "pool", "recorded"), [(1, 4, 1), (2, 4, 2), (4, 2, 2)])
def test_the_record_says_how_many_threads_ran(
    compiled_for: int, pool: int, recorded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = tvm.get_global_func
    monkeypatch.setattr(tvm, "get_global_func", lambda name: (lambda: pool) if name == "runtime.NumThreads" else find(name))
    image, settings = np.zeros((1, 1, 4, 4), np.float32), TimingSettings(0.01, 0.01, 3)
    assert measure_latency(Machine(), image, settings, compiled_for).threads == recorded
    (paired,) = measure_paired(Machine(), [Machine()], image, 1.0, settings, compiled_for)
    assert paired.threads == recorded
