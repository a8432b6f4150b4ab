"""CUDA kernels of depthwise convolutions and pools, executed without a GPU, against the NumPy reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cuda_emulator import run_emulated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_runner import make_op, random_inputs
from test_channel_clip import clipping
from test_convolution import CASES, FLOAT_DTYPES, INTEGER_DTYPES, convolution, convolutions, largest_integers
from test_elementwise import pools
from test_int16 import op_of

from qsearch.kernels.cuda import depthwise_plan, depthwise_quads_plan
from qsearch.kernels.cuda.depthwise import depthwise
from qsearch.kernels.cuda.depthwise_plan import DepthwisePlan
from qsearch.kernels.cuda.depthwise_quads_plan import QuadsPlan
from qsearch.models.graph import Conv, Pool
from qsearch.quantize.lower_nodes import scalars
from qsearch.quantize.program import FLOATS, OpKey
from qsearch.quantize.reference import run_op

RELAXED = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FEW = settings(RELAXED, max_examples=6)
U8, I16, F8, F16, F32 = "uint8", "int16", "float8_e4m3fn", "float16", "float32"
INTEGER_CASES = [(p, dtypes) for p in CASES for dtypes in CASES[p]] + [("int8", dtypes) for dtypes in INTEGER_DTYPES]


@st.composite
def depthwise_cases(draw):
    """Geometry, image, output channels; and how many threads are enough, which decides the tile."""
    conv, image, _ = draw(convolutions())
    channels, multiple = draw(st.sampled_from([2, 3, 4, 8, 12, 16, 24])), draw(st.sampled_from([1, 1, 1, 2, 3, 4, 8]))
    return replace(conv, groups=channels), (*image[:3], channels), channels * multiple


@pytest.fixture(params=[1, 1 << 16], ids=["tiles", "pixels"])
def enough(request, monkeypatch):
    for plan in (depthwise_plan, depthwise_quads_plan):
        monkeypatch.setattr(plan, "ENOUGH_THREADS", request.param)


def check_depthwise(op, seed, kernel=None):
    inputs = random_inputs(np.random.default_rng(seed + 1), op.key, largest_integers(op.key, seed)[0])
    np.testing.assert_array_equal(run_emulated(op, inputs, kernel=kernel), run_op(op, inputs))


@RELAXED
@given(case=depthwise_cases(), kind=st.sampled_from(INTEGER_CASES), clips=st.booleans(), seed=st.integers(0, 2**16))
def test_integer_depthwise_is_exact(enough, case, kind, clips, seed):
    op = convolution(*case, kind[1], seed, kind[0])
    check_depthwise(clipping(op, seed) if clips else op, seed)


@FEW
@given(case=depthwise_cases(), dtypes=st.sampled_from(INTEGER_DTYPES), seed=st.integers(0, 2**16))
def test_bytes_one_by_one_are_exact(enough, case, dtypes, seed):
    """The kernel that other dtypes have, where channels are no multiple of four, on any channels."""
    op = convolution(*case, dtypes, seed, "int8")
    check_depthwise(op, seed, depthwise(op.key, "sm_90"))


@FEW
@given(case=depthwise_cases(), channels=st.sampled_from([4, 12, 20]), clips=st.booleans(), seed=st.integers(0, 2**16))
def test_quads_are_exact(enough, case, channels, clips, seed):
    conv, image, _ = case
    op = convolution(replace(conv, groups=channels), (*image[:3], channels), channels, (U8, U8), seed, "int8")
    check_depthwise(clipping(op, seed) if clips else op, seed)


@pytest.mark.parametrize("value", [0, 255])
def test_depthwise_at_the_ends(enough, value):
    op = convolution(Conv((3, 3), (1, 1), (1, 1, 1, 1), groups=16), (1, 5, 6, 16), 16, (U8, U8), 3)
    inputs = [np.full(op.key.shapes[0], value, np.uint8)]
    op.constants["weight"][:] = 127
    np.testing.assert_array_equal(run_emulated(op, inputs), run_op(op, inputs))


def in_floats(op, dtype):
    """The same layer with every float32 tensor in another float, the accumulator excepted; float8 has multipliers."""
    key = replace(op.key, dtypes=tuple(dtype if given == F32 else given for given in op.key.dtypes), precision=PRECISION[dtype])
    constants = op.constants | {"weight": op.constants["weight"].astype(dtype)}
    if key.dtypes[-1] in (F16, F32):
        constants["floats"][FLOATS.index("multiplier")] = 1
    if dtype == F8:
        constants["multiplier"] = np.linspace(0.5, 2, len(constants["bias"]), dtype=np.float32)
    return replace(op, key=key, constants=constants, output=replace(op.output, dtype=key.dtypes[-1]))


PRECISION = {F8: "fp8", F16: "fp16", F32: "fp32"}


@FEW
@given(
    case=depthwise_cases(),
    dtypes=st.sampled_from(FLOAT_DTYPES),
    computed=st.sampled_from([F8, F16, F32]),
    clips=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_float_depthwise_agrees(enough, case, dtypes, computed, clips, seed):
    op = convolution(*case, dtypes, seed)
    op = in_floats(clipping(op, seed) if clips else op, computed)
    inputs = random_inputs(np.random.default_rng(seed + 1), op.key, 100)
    found, wanted = (x.astype(np.float64) for x in (run_emulated(op, inputs), run_op(op, inputs)))
    # A sum on the edge between two numbers of a short float may become either.
    step = {F32: 1e-6, F16: 2.0**-10, F8: 2.0**-3}.get(op.output.dtype, 0) * np.abs(wanted)
    assert (np.abs(found - wanted) <= step + (1e-3 if op.output.dtype in PRECISION else 1)).all()


def test_tiles_grow_with_the_work():
    small, large = (
        OpKey("conv2d", ((n, 14, 14, 96),) * 2, (U8, U8), "int8", Conv((3, 3), (1, 1), (1, 1, 1, 1), groups=96)) for n in (1, 128)
    )
    assert (DepthwisePlan(small).columns, DepthwisePlan(large).columns, DepthwisePlan(large).lanes) == (1, 4, 8)
    assert (QuadsPlan(small).rows, QuadsPlan(small).columns) == (1, 1)
    assert (QuadsPlan(large).rows, QuadsPlan(large).columns) == (2, 4)


@RELAXED
@given(case=pools(), dtype=st.sampled_from([U8, I16, F16, F32]), seed=st.integers(0, 2**16))
def test_maxima_are_exact(case, dtype, seed):
    pool, image, out = case
    key = OpKey("max_pool2d", (image, out), (dtype, dtype), pool=pool)
    inputs = random_inputs(np.random.default_rng(seed), key)
    np.testing.assert_array_equal(run_emulated(make_op(key), inputs), run_op(make_op(key), inputs))


@st.composite
def wide_pools(draw):
    """Whole images, which several threads reduce together."""
    n, channels = draw(st.integers(1, 2)), draw(st.sampled_from([1, 3, 8, 40, 132, 140]))
    height, width = draw(st.integers(4, 9)), draw(st.integers(4, 9))
    return Pool((height, width), (height, width)), (n, height, width, channels), (n, 1, 1, channels)


@FEW
@given(
    case=st.one_of(pools(), wide_pools()),
    kind=st.sampled_from([(U8, U8), (U8, F32), (U8, I16), (I16, I16), (I16, U8), (U8, F16)]),
    clipped=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_integer_averages_are_exact(case, kind, clipped, seed):
    pool, image, out = case
    key = OpKey("avg_pool2d", (image, out), kind, pool=pool, clipped=clipped and kind[1] in (F16, F32))
    op = make_op(key, **op_of(replace(key, dtypes=(kind[0], F32 if kind[1] == F16 else kind[1])), seed).constants)
    inputs = random_inputs(np.random.default_rng(seed), op.key)
    np.testing.assert_array_equal(run_emulated(op, inputs), run_op(op, inputs))


@RELAXED
@given(case=wide_pools(), dtype=st.sampled_from([U8, F16]), seed=st.integers(0, 2**16))
def test_global_maxima_are_exact(case, dtype, seed):
    pool, image, out = case
    key = OpKey("max_pool2d", (image, out), (dtype, dtype), pool=pool)
    inputs = random_inputs(np.random.default_rng(seed), key)
    np.testing.assert_array_equal(run_emulated(make_op(key), inputs), run_op(make_op(key), inputs))


@RELAXED
@given(case=st.one_of(pools(), wide_pools()), dtype=st.sampled_from([F16, F32]), seed=st.integers(0, 2**16))
def test_float_averages_agree(case, dtype, seed):
    pool, image, out = case
    op = make_op(OpKey("avg_pool2d", (image, out), (dtype, dtype), pool=pool))
    inputs = random_inputs(np.random.default_rng(seed), op.key)
    found, wanted = (x.astype(np.float64) for x in (run_emulated(op, inputs), run_op(op, inputs)))
    np.testing.assert_allclose(found, wanted, rtol=1e-5 if dtype == F32 else 1e-3, atol=1e-5 if dtype == F32 else 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("value", [-(2**15) + 1, 2**15 - 1])
def test_the_largest_average_does_not_overflow(value):
    key = OpKey("avg_pool2d", ((1, 256, 256, 1), (1, 1, 1, 1)), (I16, I16), pool=Pool((256, 256)))
    op = make_op(key, **scalars(multiplier=2.0**-16, qmin=-(2**15) + 1, qmax=2**15 - 1))
    found = run_emulated(op, [np.full(key.shapes[0], value, np.int16)])
    np.testing.assert_array_equal(found, np.full(key.shapes[1], value, np.int16))
