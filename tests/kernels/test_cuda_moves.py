"""CUDA kernels that change layouts and select channels, executed without a GPU, against the NumPy reference."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_emulator import run_emulated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_runner import make_op, random_inputs
from test_elementwise import SHAPES
from test_select import selections

from qsearch.kernels.cuda.select import runs_of
from qsearch.quantize.lower_nodes import scalars
from qsearch.quantize.program import OpKey
from qsearch.quantize.reference import run_op

RELAXED = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
U8, I16, F8, F16, F32 = "uint8", "int16", "float8_e4m3fn", "float16", "float32"
EVERY_DTYPE = [U8, I16, F16, F32]
MOVED_DTYPES = [*EVERY_DTYPE, F8]
SCALARS = {
    U8: scalars(multiplier=40.0, zero_point=100, qmin=3, qmax=240),
    I16: scalars(multiplier=9000.0, qmin=-30_000, qmax=30_001),
    F8: scalars(multiplier=90.0, low=-448, high=448),
    F16: scalars(low=-65504, high=65504),
    F32: scalars(),
}


def check(op, inputs):
    np.testing.assert_array_equal(run_emulated(op, inputs), run_op(op, inputs))


@RELAXED
@given(shape=SHAPES, few=st.booleans(), dtype=st.sampled_from(MOVED_DTYPES), seed=st.integers(0, 2**16))
def test_channels_last_is_exact(shape, few, dtype, seed):
    n, height, width, channels = shape
    channels = 1 + channels % 4 if few else channels
    key = OpKey("to_channels_last", ((n, channels, height, width), (n, height, width, channels)), (F32, dtype))
    inputs = random_inputs(np.random.default_rng(seed), key)
    # Values that are clipped, and one that float16 does not hold.
    inputs[0].ravel()[:2] = [-70_000, 3e5][: inputs[0].size]
    check(make_op(key, **SCALARS[dtype]), inputs)


@RELAXED
@given(shape=SHAPES, dtype=st.sampled_from(MOVED_DTYPES))
def test_channels_first_is_exact(shape, dtype):
    n, height, width, channels = shape
    key = OpKey("to_channels_first", (shape, (n, channels, height, width)), (dtype, dtype))
    check(make_op(key), random_inputs(np.random.default_rng(1), key))


@RELAXED
@given(
    case=selections(),
    pixels=st.sampled_from([(2,), (1, 3, 2), (2, 5, 7)]),
    dtype=st.sampled_from(EVERY_DTYPE),
    data=st.data(),
)
def test_selections_are_exact(case, pixels, dtype, data):
    widths, channels = case
    shapes = (*((*pixels, width) for width in widths), (*pixels, len(channels) if channels else sum(widths)))
    copies = tuple(dtype in (F16, F32) or data.draw(st.booleans()) for _ in widths)
    key = OpKey("concat", shapes, (dtype,) * len(shapes), copies=copies, channels=channels)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    zero_points = rng.integers(0, 256, len(widths)) if dtype == U8 else np.zeros(len(widths))
    op = make_op(
        key,
        **SCALARS[dtype],
        multipliers=(2 * rng.random(len(widths))).astype(np.float32),
        zero_points=zero_points.astype(np.int32),
    )
    check(op, random_inputs(rng, key))


@RELAXED
@given(case=selections(), lanes=st.sampled_from([1, 2, 4, 8]))
def test_runs_describe_the_selection(case, lanes):
    widths, channels = case
    origin = [(i, channel) for i, width in enumerate(widths) for channel in range(width)]
    places = tuple(origin if channels is None else (origin[channel] for channel in channels))
    found = runs_of(places, widths, lanes)
    if found is None:
        return
    written = {}
    for run in found:
        each = lanes // len(run.streams)
        for at in range(run.count * each):
            for j, (i, channel) in enumerate(run.streams):
                written[run.first * lanes + at * len(run.streams) + j] = i, channel + at
    assert tuple(written[c] for c in range(len(places))) == places


@pytest.mark.parametrize("half", [0, 1])
def test_half_of_a_shuffle_is_one_run(half):
    shuffled = [(group, i) for i in range(64) for group in range(2)]
    (run,) = runs_of(tuple(shuffled[64 * half :][:64]), (64, 64), 8)
    assert run.streams == ((0, 32 * half), (1, 32 * half))
