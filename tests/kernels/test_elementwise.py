"""Compiled elementwise, pooling and layout kernels against the NumPy reference."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_runner import TARGETS, make_op, random_inputs, run_kernel, target_named

from qsearch.errors import BuildError
from qsearch.kernels.cpu import describe_kernel
from qsearch.models.graph import ACTIVATIONS, Pool
from qsearch.quantize.lower_nodes import scalars
from qsearch.quantize.program import OpKey
from qsearch.quantize.reference import run_op

RELAXED = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9), st.integers(1, 70))
U8, F32 = "uint8", "float32"


def quantization(seed):
    """Random scalars of a quantized operation."""
    rng = np.random.default_rng(seed)
    zero_points = {name: rng.integers(0, 256) for name in ("a_zero_point", "b_zero_point", "zero_point")}
    multipliers = {name: rng.random() for name in ("a_multiplier", "b_multiplier")}
    return scalars(**zero_points, **multipliers, multiplier=rng.random() / 20, low=-2.0, high=5.0, qmin=3, qmax=240)


def assert_exact(key, seed, target, **constants):
    op = make_op(key, **(quantization(seed) | constants))
    inputs = random_inputs(np.random.default_rng(seed), key)
    np.testing.assert_array_equal(run_kernel(op, inputs, target_named(target)), run_op(op, inputs))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("kind", "dtypes"),
    [
        ("quantize", (F32, U8)),
        ("dequantize", (U8, F32)),
        ("add", (U8, U8, U8)),
        ("add", (U8, F32, U8)),
        ("add", (F32, F32, F32)),
        ("mul", (U8, U8, U8)),
        ("mul", (U8, U8, F32)),
    ],
)
@RELAXED
@given(shape=SHAPES, clipped=st.booleans(), seed=st.integers(0, 2**16))
def test_elementwise_is_exact(target, kind, dtypes, shape, clipped, seed):
    assert_exact(OpKey(kind, (shape,) * len(dtypes), dtypes, clipped=clipped and dtypes[-1] == F32), seed, target)


@pytest.mark.parametrize("target", TARGETS)
@RELAXED
@given(shape=SHAPES, seed=st.integers(0, 2**16))
def test_gate_multiplication_is_exact(target, shape, seed):
    gate = (shape[0], 1, 1, shape[3])
    assert_exact(OpKey("mul", (shape, gate, shape), (U8, U8, U8)), seed, target)


@pytest.mark.parametrize("target", TARGETS)
@RELAXED
@given(shape=SHAPES, seed=st.integers(0, 2**16))
def test_lookup_is_exact(target, shape, seed):
    table = np.random.default_rng(seed).integers(0, 256, 256, dtype=np.uint8)
    assert_exact(OpKey("lookup", (shape, shape), (U8, U8)), seed, target, table=table)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("function", [name for name in ACTIVATIONS if name not in ("relu", "relu6")])
def test_float_activations_agree(target, function):
    key = OpKey("activation", ((1, 5, 3, 37),) * 2, (F32, F32), function=function, clipped=function == "clip")
    op = make_op(key, **scalars(low=-1.0, high=2.0))
    inputs = random_inputs(np.random.default_rng(3), key)
    np.testing.assert_allclose(run_kernel(op, inputs, target_named(target)), run_op(op, inputs), rtol=2e-6, atol=2e-6)


# Only integers are in another unit than real numbers.
CLIPS = {
    U8: scalars(multiplier=40.0, zero_point=100, qmin=60, qmax=220),
    "int16": scalars(multiplier=8000.0, qmin=-20_000, qmax=30_000),
    F32: scalars(low=-2.0, high=5.0),
}


@pytest.mark.parametrize("target", TARGETS)
@RELAXED
@given(shape=SHAPES, dtype=st.sampled_from(list(CLIPS)), seed=st.integers(0, 2**16))
def test_clip_of_floats_is_exact(target, shape, dtype, seed):
    key = OpKey("activation", (shape, shape), (F32, dtype), function="clip", clipped=dtype == F32)
    assert_exact(key, seed, target, **CLIPS[dtype])


def test_an_unknown_function_is_refused():
    key = OpKey("activation", ((1, 2, 2, 3),) * 2, (F32, F32), function="mish")
    with pytest.raises(BuildError, match="'mish'"):
        describe_kernel(key, target_named("host").isa).generate("tested")


@st.composite
def pools(draw):
    """A pool and an image it fits."""
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    padding = tuple(draw(st.integers(0, k // 2)) for k in (*kernel, *kernel))
    pool = Pool(kernel, (draw(st.integers(1, 3)), draw(st.integers(1, 3))), padding, draw(st.booleans()))
    n, height, width, channels = draw(SHAPES)
    height, width = max(height, kernel[0]), max(width, kernel[1])
    rows = (height + padding[0] + padding[2] - kernel[0]) // pool.stride[0] + 1
    cols = (width + padding[1] + padding[3] - kernel[1]) // pool.stride[1] + 1
    return pool, (n, height, width, channels), (n, rows, cols, channels)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("kind", "dtypes"), [("max_pool2d", (U8, U8)), ("max_pool2d", (F32, F32)), ("avg_pool2d", (U8, U8))])
@RELAXED
@given(case=pools(), seed=st.integers(0, 2**16))
def test_pooling_is_exact(target, kind, dtypes, case, seed):
    pool, image, out = case
    assert_exact(OpKey(kind, (image, out), dtypes, pool=pool), seed, target)


@pytest.mark.parametrize("target", TARGETS)
@RELAXED
@given(case=pools(), seed=st.integers(0, 2**16))
def test_float_average_agrees(target, case, seed):
    pool, image, out = case
    op = make_op(OpKey("avg_pool2d", (image, out), (F32, F32), pool=pool))
    inputs = random_inputs(np.random.default_rng(seed), op.key)
    np.testing.assert_allclose(run_kernel(op, inputs, target_named(target)), run_op(op, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [U8, F32])
@RELAXED
@given(shape=SHAPES, seed=st.integers(0, 2**16))
def test_channels_last_is_exact(target, dtype, shape, seed):
    n, height, width, channels = shape
    assert_exact(OpKey("to_channels_last", ((n, channels, height, width), shape), (F32, dtype)), seed, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [U8, F32])
@RELAXED
@given(shape=SHAPES)
def test_channels_first_is_exact(target, dtype, shape):
    n, height, width, channels = shape
    assert_exact(OpKey("to_channels_first", (shape, (n, channels, height, width)), (dtype, dtype)), 1, target)


IMAGE = (2, 19, 13, 70)
THREADED = {
    "add": OpKey("add", (IMAGE,) * 3, (U8, U8, U8)),
    "gate": OpKey("mul", (IMAGE, (2, 1, 1, 70), IMAGE), (U8, U8, U8)),
    "lookup": OpKey("lookup", (IMAGE,) * 2, (U8, U8)),
    "maximum": OpKey("max_pool2d", (IMAGE, (2, 10, 7, 70)), (U8, U8), pool=Pool((3, 3), (2, 2), (1, 1, 1, 1))),
    "average": OpKey("avg_pool2d", (IMAGE, (2, 16, 10, 70)), (U8, U8), pool=Pool((4, 4))),
    "last": OpKey("to_channels_last", ((2, 70, 19, 13), IMAGE), (F32, U8)),
    "image": OpKey("to_channels_last", ((2, 3, 90, 91), (2, 90, 91, 3)), (F32, U8)),
    "first": OpKey("to_channels_first", (IMAGE, (2, 70, 19, 13)), (U8, U8)),
    "concat": OpKey("concat", (IMAGE, IMAGE, (*IMAGE[:3], 70)), (U8,) * 3, copies=(True, False), channels=(*range(35, 105),)),
}


@pytest.mark.parametrize("name", THREADED)
def test_shared_between_threads_it_is_the_same(name):
    key = THREADED[name]
    count = len(key.shapes) - 1
    extra = {"table": np.arange(256, dtype=np.uint8)[::-1], "multipliers": np.full(count, 0.7, np.float32)}
    op = make_op(key, **quantization(5), **extra, zero_points=np.full(count, 9, np.int32))
    inputs = random_inputs(np.random.default_rng(5), key)
    shared = replace(target_named("host"), threads=2)
    assert "parallel" in describe_kernel(key, shared.isa, 2).generate("shared").script()
    np.testing.assert_array_equal(run_kernel(op, inputs, shared), run_op(op, inputs))
