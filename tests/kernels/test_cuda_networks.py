"""Every operation of whole programs by its CUDA kernel, executed without a GPU, on the reference's inputs."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from cuda_emulator import run_emulated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import NETWORKS, images, network, ranges_of

from qsearch.build.foreign import run_foreign
from qsearch.config import QuantConfig
from qsearch.qtype import PRECISIONS
from qsearch.quantize.lower import lower
from qsearch.quantize.program import OpKey
from qsearch.quantize.reference import run_program
from qsearch.quantize.weight_store import WeightStore

RELAXED = settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
INTEGERS = ("uint8", "int16")
# Dense layers in fp8 have no kernel yet.
PROVEN = [name for name in PRECISIONS if name != "fp8"]
# These compute in float inside, whatever they read and write.
INEXACT = ("layer_norm", "softmax", "l2_normalize")


@cache
def model_of(name):
    model, _ = network(name)
    return model, ranges_of(model, QuantConfig())


def check_program(name, seen: set[OpKey] | None = None, **options):
    """Operations of every kind but foreign ones, each key once where `seen` is given."""
    model, ranges = model_of(name)
    program = lower(model, QuantConfig.model_validate(options), ranges, WeightStore())
    values = run_program(program, images(1, 4), lambda op, inputs: run_foreign(op.key, op.constants, inputs))
    for op in program.ops:
        if op.key.kind == "foreign" or (seen is not None and op.key in seen):
            continue
        if seen is not None:
            seen.add(op.key)
        found, wanted = run_emulated(op, [values[given] for given in op.inputs]), values[op.output.name]
        assert_near(op, found, wanted)


def assert_near(op, found, wanted):
    """Bit for bit where the arithmetic says so, else within a step or the rounding of float sums."""
    key, out = op.key, op.output.dtype
    sums = key.precision not in (None, "int8", "int16", "w4a8") or (key.kind == "avg_pool2d" and key.dtypes[0] not in INTEGERS)
    function = key.kind == "activation" and key.function != "clip"
    if not (sums or function or key.kind in INEXACT):
        np.testing.assert_array_equal(found, wanted, err_msg=op.name)
    elif out in INTEGERS:
        assert np.abs(found.astype(np.float64) - wanted).max() <= 1, op.name
    else:
        precision = 2e-3 if out == "float16" or key.precision == "tf32" else 1e-4
        np.testing.assert_allclose(found, wanted, rtol=precision, atol=precision * np.abs(wanted).max(), err_msg=op.name)


@pytest.mark.parametrize("name", ["excite", "vit", "shuffle"])
def test_int8_programs_are_computed(name):
    check_program(name, seen=set())


@pytest.mark.slow
@pytest.mark.parametrize("precision", PROVEN)
@pytest.mark.parametrize("name", NETWORKS)
def test_programs_are_computed(name, precision):
    check_program(name, default_precision=precision)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@RELAXED
@given(data=st.data())
def test_mixtures_are_computed(name, data):
    layers = [layer.name for layer in model_of(name)[0].graph.layers]
    check_program(name, precision={layer: data.draw(st.sampled_from(PROVEN)) for layer in layers})
