"""Kernels shared between two threads compute what one thread computes, however the work is split."""

import numpy as np
import pytest
from kernel_runner import random_inputs, run_kernel
from test_convolution import convolution

from qsearch.build.target import open_target
from qsearch.build.threads import ThreadedModule, use_threads
from qsearch.kernels.cpu import conv_plan
from qsearch.models.graph import Conv
from qsearch.quantize.reference import run_op

BYTES = ("uint8", "uint8")
# Geometry, image, output channels, and what the threads are expected to share.
CASES = {
    "rows of a padded image": (Conv((3, 3), padding=(1, 1, 1, 1)), (1, 33, 17, 20), 40, "rows"),
    "rows of a strided image": (Conv((3, 3), (2, 2), (0, 1, 1, 0)), (1, 41, 39, 8), 24, "rows"),
    "flat pixels": (Conv(), (1, 15, 13, 36), 70, "rows"),
    "columns that do not divide": (Conv((3, 3), padding=(1, 1, 1, 1)), (1, 4, 4, 24), 100, "columns"),
    "a linear layer": (Conv(), (1, 1, 1, 300), 117, "columns"),
    "groups": (Conv((3, 3), padding=(1, 1, 1, 1), groups=4), (1, 5, 5, 32), 64, "groups"),
    "images": (Conv((3, 3), padding=(1, 1, 1, 1)), (3, 9, 9, 16), 33, "images"),
    "depthwise rows": (Conv((3, 3), padding=(1, 1, 1, 1), groups=80), (1, 31, 33, 80), 80, ""),
}


@pytest.fixture
def two_threads():
    """A pool of two threads, for one test: the pool is the process's."""
    use_threads(2)
    yield
    use_threads(1)


@pytest.mark.parametrize("precision", ["int8", "int16", "w4a8"])
@pytest.mark.parametrize("name", CASES)
def test_two_threads_are_exact(name, precision, two_threads, monkeypatch):
    monkeypatch.setattr(conv_plan, "SHARED_ABOVE", 0)
    conv, image, channels, sharing = CASES[name]
    dtypes = ("int16", "int16") if precision == "int16" else BYTES
    op = convolution(conv, image, channels, dtypes, 7, precision)
    target = open_target("host", 2)
    if sharing:
        assert conv_plan.ConvPlan(op.key, target.isa, 2).sharing == sharing
    inputs = random_inputs(np.random.default_rng(1), op.key, 1000)
    expected = run_op(op, inputs)
    for _ in range(3):
        np.testing.assert_array_equal(run_kernel(op, inputs, target), expected)


class World:
    """Stands in for the clock, the scheduler and other processes."""

    def __init__(self, monkeypatch):
        from qsearch.build import threads

        self.clock, self.switches, self.others, self.share = 0.0, 0, 0.0, 0.0
        self.configured = []
        monkeypatch.setattr(threads, "_switches", lambda: self.switches)
        monkeypatch.setattr(threads, "_seconds_of_others", lambda: self.others)
        monkeypatch.setattr(threads.time, "monotonic", lambda: self.clock)
        monkeypatch.setattr(threads, "_configure", self.configured.append)

    def call(self):
        """A call of 30 ms, switched out if others are at work."""
        self.clock += 0.03
        self.others += 0.03 * self.share
        self.switches += 10 if self.share else 0


def test_a_module_gives_way_to_another_process_and_comes_back(monkeypatch):
    world = World(monkeypatch)
    module = ThreadedModule(world.call, 2)
    for _ in range(5):
        module()
    assert not module.single
    world.share = 1.0
    for _ in range(4):
        module()
    assert module.single and world.configured == [1]
    for _ in range(40):
        module()
    assert module.single
    world.share = 0.0
    for _ in range(20):
        module()
    assert not module.single and world.configured == [1, 2]


def test_threads_of_ones_own_process_are_no_reason_to_give_way(monkeypatch):
    world = World(monkeypatch)

    def switched():
        world.call()
        world.switches += 10

    module = ThreadedModule(switched, 2)
    for _ in range(50):
        module()
    assert not module.single
