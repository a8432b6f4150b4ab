"""Compiled kernels of operations that are not layers over int16 values, against the NumPy reference."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_runner import TARGETS, make_op, random_inputs, run_kernel, target_named
from test_elementwise import SHAPES, pools

from qsearch.models.graph import ACTIVATIONS, Pool
from qsearch.quantize.lower_nodes import scalars
from qsearch.quantize.program import OpKey
from qsearch.quantize.reference import run_op

RELAXED = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
U8, I16, F32 = "uint8", "int16", "float32"
ELEMENTWISE = [
    ("quantize", (F32, I16)),
    ("dequantize", (I16, F32)),
    ("requantize", (I16, U8)),
    ("requantize", (U8, I16)),
    ("add", (I16, I16, I16)),
    ("add", (I16, U8, I16)),
    ("add", (F32, I16, U8)),
    ("mul", (I16, I16, I16)),
    ("mul", (I16, I16, U8)),
]


def op_of(key, seed, **constants):
    """An operation with random scalars that send its values over most of the output's range."""
    rng = np.random.default_rng(seed)
    zero_points = {"a_zero_point": key.dtypes[0], "b_zero_point": key.dtypes[-2], "zero_point": key.dtypes[-1]}
    values = {name: rng.integers(0, 256) if dtype == U8 else 0 for name, dtype in zero_points.items()}
    steps = {U8: 300, I16: 50_000, F32: 10}[key.dtypes[-1]]
    sizes = [{U8: 255, I16: 2**15, F32: 3}[dtype] for dtype in key.dtypes[:-1]]
    values |= {"a_multiplier": rng.random() * steps / sizes[0], "b_multiplier": rng.random() * steps / sizes[-1]}
    values["multiplier"] = rng.random() * steps / np.prod(sizes)
    values |= {"qmin": 3, "qmax": 240} if key.dtypes[-1] == U8 else {"qmin": -30_000, "qmax": 30_001}
    return make_op(key, **(scalars(low=-2.0, high=5.0, **values) | constants))


def assert_exact(op, seed, target):
    inputs = random_inputs(np.random.default_rng(seed), op.key)
    np.testing.assert_array_equal(run_kernel(op, inputs, target_named(target)), run_op(op, inputs))


@pytest.mark.parametrize("target", TARGETS)
@RELAXED
@given(case=st.sampled_from(ELEMENTWISE), shape=SHAPES, seed=st.integers(0, 2**16))
def test_elementwise_is_exact(target, case, shape, seed):
    kind, dtypes = case
    assert_exact(op_of(OpKey(kind, (shape,) * len(dtypes), dtypes), seed), seed, target)


@pytest.mark.parametrize("target", TARGETS)
@settings(RELAXED, max_examples=5)
@given(shape=SHAPES, out=st.sampled_from([I16, U8, F32]), seed=st.integers(0, 2**16))
def test_gate_multiplication_is_exact(target, shape, out, seed):
    key = OpKey("mul", (shape, (shape[0], 1, 1, shape[3]), shape), (I16, I16, out))
    assert_exact(op_of(key, seed), seed, target)


@pytest.mark.parametrize("target", TARGETS)
@RELAXED
@given(
    case=pools(),
    kind=st.sampled_from([("max_pool2d", (I16, I16)), ("avg_pool2d", (I16, I16)), ("avg_pool2d", (I16, U8))]),
    seed=st.integers(0, 2**16),
)
def test_pooling_is_exact(target, case, kind, seed):
    pool, image, out = case
    assert_exact(op_of(OpKey(kind[0], (image, out), kind[1], pool=pool), seed), seed, target)


@pytest.mark.parametrize("value", [-(2**15) + 1, 2**15 - 1])
def test_the_largest_average_does_not_overflow(value):
    key = OpKey("avg_pool2d", ((1, 256, 256, 3), (1, 1, 1, 3)), (I16, I16), pool=Pool((256, 256)))
    op = make_op(key, **scalars(multiplier=2.0**-16, qmin=-(2**15) + 1, qmax=2**15 - 1))
    found = run_kernel(op, [np.full(key.shapes[0], value, np.int16)], target_named("host"))
    np.testing.assert_array_equal(found, np.full(key.shapes[1], value, np.int16))


@pytest.mark.parametrize("target", TARGETS)
@settings(RELAXED, max_examples=6)
@given(shape=SHAPES, channels=st.lists(st.integers(1, 70), min_size=2, max_size=3), seed=st.integers(0, 2**16))
def test_concatenation_is_exact(target, shape, channels, seed):
    rng = np.random.default_rng(seed)
    shapes = (*((*shape[:3], c) for c in channels), (*shape[:3], sum(channels)))
    key = OpKey("concat", shapes, (I16,) * len(shapes), copies=(True, *(False for _ in channels[1:])))
    multipliers = (2 * rng.random(len(channels))).astype(np.float32)
    op = op_of(key, seed, multipliers=multipliers, zero_points=np.zeros(len(channels), np.int32))
    assert_exact(op, seed, target)


@pytest.mark.parametrize("target", TARGETS)
@settings(RELAXED, max_examples=6)
@given(shape=SHAPES, seed=st.integers(0, 2**16))
def test_channels_last_is_exact(target, shape, seed):
    n, height, width, channels = shape
    assert_exact(op_of(OpKey("to_channels_last", ((n, channels, height, width), shape), (F32, I16)), seed), seed, target)


def test_channels_first_is_exact():
    assert_exact(op_of(OpKey("to_channels_first", ((2, 5, 7, 11), (2, 11, 5, 7)), (I16, I16)), 1), 1, "host")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("function", [name for name in ACTIVATIONS if name not in ("relu", "relu6")])
def test_activations_agree(target, function):
    """Functions are rounded differently on every target: within one step; a clip is exact."""
    key = OpKey("activation", ((1, 5, 3, 37),) * 2, (I16, I16), function=function)
    op = make_op(key, **scalars(a_multiplier=8 / 2**15, multiplier=2**15 / 8, qmin=-1000, qmax=2**15 - 1))
    inputs = random_inputs(np.random.default_rng(3), key)
    difference = run_kernel(op, inputs, target_named(target)).astype(np.int32) - run_op(op, inputs)
    assert np.abs(difference).max() <= (0 if function == "clip" else 1)
