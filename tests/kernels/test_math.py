"""Transcendental functions over vectors against double precision, over the whole range that matters."""

import numpy as np
import pytest
import tvm
from kernel_runner import TARGETS, target_named
from scipy.special import ndtr
from tvm.tirx.script import builder as T

from qsearch.kernels.cpu import math as vector_math
from qsearch.kernels.cpu.vectors import for_vectors, kernel, load, store

REFERENCES = {
    "exp": (np.exp, 80.0, 2e-7),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), 80.0, 4e-7),
    "tanh": (np.tanh, 80.0, 5e-7),
    # Towards -12 the exponent's rounding grows with its magnitude.
    "normal_cdf": (ndtr, 5.0, 3e-6),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", REFERENCES)
def test_functions_are_accurate_relatively(target, name):
    function, reach, tolerance = REFERENCES[name]
    x = np.concatenate([np.linspace(-reach, reach, 20010), np.geomspace(1e-20, 1, 500), -np.geomspace(1e-20, 1, 500)])
    x = x.astype(np.float32)

    def body():
        source = T.arg("source", T.Buffer((len(x),), "float32"))
        output = T.arg("output", T.Buffer((len(x),), "float32"))
        lanes = target_named(target).isa.lanes
        for_vectors(len(x), lanes, lambda i, n: store(output, i, getattr(vector_math, name)(load(source, i, n), n), n))

    module = tvm.compile(tvm.IRModule({"tested": kernel("tested", body)}), target=target_named(target).tvm())
    output = tvm.runtime.tensor(np.zeros_like(x))
    module.mod["tested"](tvm.runtime.tensor(x), output)
    expected = function(x.astype(np.float64))
    assert (np.abs(output.numpy() - expected) / np.abs(expected)).max() <= tolerance


@pytest.mark.parametrize("target", TARGETS)
def test_arguments_beyond_reach_saturate(target):
    """The kernel of a softmax meets minus infinity where a mask forbids a position."""
    x = np.array([-np.inf, -1e30, 1e30, np.inf], np.float32)

    def body():
        source, output = (T.arg(name, T.Buffer((4,), "float32")) for name in ("source", "output"))
        store(output, 0, vector_math.exp(load(source, 0, 4), 4), 4)

    module = tvm.compile(tvm.IRModule({"tested": kernel("tested", body)}), target=target_named(target).tvm())
    output = tvm.runtime.tensor(np.zeros_like(x))
    module.mod["tested"](tvm.runtime.tensor(x), output)
    assert (output.numpy()[:2] < 1e-34).all() and (output.numpy()[2:] > 1e34).all()
