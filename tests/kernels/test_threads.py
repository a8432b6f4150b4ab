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


@pytest.mark.parametrize("precision", ["int8", "int16", "w4a8"])
@pytest.mark.parametrize("name", CASES)
def test_two_threads_are_exact(name, precision, monkeypatch):
    monkeypatch.setattr(conv_plan, "SHARED_ABOVE", 0)
    use_threads(2)
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


def test_a_module_gives_way_and_comes_back(monkeypatch):
    from qsearch.build import threads

    switches, idle, clock, configured = [0], [0.0], [0.0], []
    monkeypatch.setattr(threads, "_switches", lambda: switches[0])
    monkeypatch.setattr(threads, "_idle_seconds", lambda: idle[0])
    monkeypatch.setattr(threads.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(threads, "_configure", configured.append)

    def contended():
        switches[0] += 10

    module = ThreadedModule(contended, 2)
    for _ in range(threads.CONTENDED_CALLS):
        assert not module.single
        module()
    assert module.single and configured == [1]
    clock[0] += 1.0
    module()
    assert module.single  # no processor was idle
    clock[0] += 1.0
    idle[0] += 1.0
    module()
    assert not module.single and configured == [1, 2]


def test_one_contended_call_is_not_enough(monkeypatch):
    from qsearch.build import threads

    switches, steps = [0], iter([10, 0, 10, 10, 0, 10, 10, 0])
    monkeypatch.setattr(threads, "_switches", lambda: switches[0])

    def sometimes():
        switches[0] += next(steps)

    module = ThreadedModule(sometimes, 2)
    for _ in range(8):
        module()
    assert not module.single
