"""CUDA kernels that visit every element once, executed without a GPU, against the NumPy reference."""

import numpy as np
import pytest
from cuda_emulator import KernelFault, emulate, run_emulated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_runner import make_op, random_inputs
from tvm.tirx.script import builder as T

from qsearch.kernels.cuda.simt import constant, grid, kernel, load, registers, shared, store, sync
from qsearch.quantize.lower_nodes import scalars
from qsearch.quantize.program import OpKey
from qsearch.quantize.reference import run_op

RELAXED = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SCALARS = scalars(
    a_zero_point=7, b_zero_point=130, zero_point=9, qmin=1, qmax=250, a_multiplier=0.31, b_multiplier=0.017, multiplier=0.02
)
SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5), st.integers(1, 40))


def check_exact(kind, shape, dtypes, seed, **more):
    key = OpKey(kind, (shape,) * len(dtypes), dtypes, **more)
    op = make_op(key, **SCALARS)
    inputs = random_inputs(np.random.default_rng(seed), key)
    np.testing.assert_array_equal(run_emulated(op, inputs), run_op(op, inputs))


@RELAXED
@given(SHAPES, st.sampled_from(["uint8", "int16", "float32"]), st.sampled_from(["uint8", "int16"]), st.integers(0, 2**31))
def test_conversions_are_exact(shape, given, wanted, seed):
    check_exact("quantize" if given == "float32" else "requantize", shape, (given, wanted), seed)
    check_exact("dequantize", shape, (wanted, "float32"), seed)


@RELAXED
@given(SHAPES, st.lists(st.sampled_from(["uint8", "int16", "float32"]), min_size=3, max_size=3), st.integers(0, 2**31))
def test_sums_are_exact(shape, dtypes, seed):
    check_exact("add", shape, tuple(dtypes), seed)


@RELAXED
@given(SHAPES, st.sampled_from(["uint8", "int16", "float32"]), st.integers(0, 2**31))
def test_products_are_exact(shape, dtype, seed):
    check_exact("mul", shape, (dtype, dtype, "uint8"), seed)
    key = OpKey("mul", (shape, (shape[0], 1, 1, shape[3]), shape), (dtype, dtype, "uint8"))
    op = make_op(key, **SCALARS)
    inputs = random_inputs(np.random.default_rng(seed), key)
    np.testing.assert_array_equal(run_emulated(op, inputs), run_op(op, inputs))


@RELAXED
@given(SHAPES, st.integers(0, 2**31))
def test_lookups_are_exact(shape, seed):
    rng = np.random.default_rng(seed)
    key = OpKey("lookup", (shape, shape), ("uint8", "uint8"))
    op = make_op(key, table=rng.integers(0, 256, 256, dtype=np.uint8))
    inputs = random_inputs(rng, key)
    np.testing.assert_array_equal(run_emulated(op, inputs), run_op(op, inputs))


@pytest.mark.parametrize("function", ["hardswish", "hardsigmoid", "gelu", "tanh", "silu", "sigmoid"])
def test_activations(function):
    key = OpKey("activation", ((1, 3, 5, 7),) * 2, ("float32", "float32"), function=function)
    op = make_op(key)
    inputs = random_inputs(np.random.default_rng(0), key)
    np.testing.assert_allclose(run_emulated(op, inputs), run_op(op, inputs), rtol=1e-5, atol=1e-6)


def faulty(body):
    """A kernel of 64 threads over 64 elements."""

    def write():
        source, output = T.arg("source", T.Buffer((64,), "int32")), T.arg("output", T.Buffer((64,), "int32"))
        with grid(1, 64) as (_, thread):
            body(source, output, thread)

    return kernel("faulty", write)


def reverse(source, output, thread, waits=True):
    kept = shared(64, "int32")
    store(kept, thread, load(source, thread))
    if waits:
        sync()
    store(output, thread, load(kept, 63 - thread))


def test_the_emulator_runs_what_is_right():
    output = np.zeros(64, np.int32)
    emulate(faulty(reverse), [np.arange(64, dtype=np.int32), output])
    np.testing.assert_array_equal(output, np.arange(63, -1, -1))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda s, o, t: reverse(s, o, t, waits=False), "another thread wrote since the last barrier"),
        (lambda s, o, t: store(o, t, load(s, t + 1)), "is accessed at 64"),
        (lambda s, o, t: store(o, t, load(registers(1, "int32"), 0)), "a register is read that nothing was written to"),
        (lambda s, o, t: store(o, t, load(shared(64, "int32"), t)), "shared memory is read that nothing was written to"),
        (lambda s, o, t: store(shared(4, "int32"), 0, constant(1, "int32")), "several threads write the same byte"),
    ],
)
def test_the_emulator_sees_what_is_wrong(body, why):
    with pytest.raises(KernelFault, match=why):
        emulate(faulty(body), [np.arange(64, dtype=np.int32), np.zeros(64, np.int32)])
