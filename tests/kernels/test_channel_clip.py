"""Layers that clip every output channel at its own high end: compiled kernels against the reference, bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_runner import random_inputs, run_kernel, target_named
from test_convolution import CASES, FLOAT_DTYPES, INTEGER_DTYPES, RELAXED, convolution, convolutions, depthwise_convolutions
from test_isa import other_isa  # noqa: F401

from qsearch.models.graph import Conv
from qsearch.quantize.program import Op
from qsearch.quantize.reference import run_op

EVERY_DTYPES = [("int8", dtypes) for dtypes in INTEGER_DTYPES] + [(p, dtypes) for p in CASES for dtypes in CASES[p]]
TARGETS = ("host", "portable")
FEW = settings(RELAXED, max_examples=3)


def clipping(op: Op, seed: int) -> Op:
    """The same layer with high ends from nothing to beyond what is reached."""
    dtype, channels = op.output.dtype, op.output.shape[-1]
    largest = {"uint8": 255, "int16": 30_000, "float32": 40}[dtype]
    high = np.random.default_rng(seed + 2).uniform(-0.1 * largest, largest, channels).astype(np.float32)
    high = high if dtype == "float32" else np.rint(high)
    high[::7] = np.inf
    return replace(op, key=replace(op.key, clips_channels=True), constants=op.constants | {"clip_high": high})


def assert_exact(op: Op, seed: int, target) -> None:
    """The kernel gives the reference's bits."""
    inputs = random_inputs(np.random.default_rng(seed + 1), op.key, 2000)
    clipped = clipping(op, seed)
    np.testing.assert_array_equal(run_kernel(clipped, inputs, target), run_op(clipped, inputs))


def any_layer() -> st.SearchStrategy:
    """Dense, grouped and depthwise convolutions, and linear layers."""
    linear = st.tuples(
        st.just(Conv()), st.tuples(st.integers(1, 9), st.just(1), st.just(1), st.integers(1, 300)), st.integers(1, 99)
    )
    return st.one_of(convolutions(), depthwise_convolutions(), linear)


@pytest.mark.parametrize("target", TARGETS)
@settings(RELAXED, max_examples=6)
@given(case=any_layer(), data=st.sampled_from(EVERY_DTYPES), seed=st.integers(0, 2**16))
def test_layers_are_exact(target, case, data, seed):
    assert_exact(convolution(*case, data[1], seed, data[0]), seed, target_named(target))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@settings(RELAXED, max_examples=150)
@given(case=any_layer(), data=st.sampled_from(EVERY_DTYPES), seed=st.integers(0, 2**16))
def test_many_layers_are_exact(target, case, data, seed):
    assert_exact(convolution(*case, data[1], seed, data[0]), seed, target_named(target))


@FEW
@given(case=depthwise_convolutions(), precision=st.sampled_from(["int8", "w4a8"]), seed=st.integers(0, 2**16))
def test_bytes_of_depthwise_layers_are_exact(case, precision, seed):
    """Bytes in and out are the case of the writer that dots four kernel rows."""
    assert_exact(convolution(*case, ("uint8", "uint8"), seed, precision), seed, target_named("host"))


@settings(RELAXED, max_examples=1)
@given(case=any_layer(), data=st.sampled_from(EVERY_DTYPES), seed=st.integers(0, 2**16))
def test_other_instruction_sets_are_exact(other_isa, case, data, seed):  # noqa: F811
    assert_exact(convolution(*case, data[1], seed, data[0]), seed, other_isa)


@FEW
@given(case=any_layer(), dtypes=st.sampled_from(FLOAT_DTYPES), seed=st.integers(0, 2**16))
def test_float_layers_agree(case, dtypes, seed):
    op = clipping(convolution(*case, dtypes, seed), seed)
    inputs = random_inputs(np.random.default_rng(seed + 1), op.key, 100)
    found, expected = (x.astype(np.float64) for x in (run_kernel(op, inputs, target_named("host")), run_op(op, inputs)))
    assert np.abs(found - expected).max() <= (1 if dtypes[-1] != "float32" else 1e-3)


def test_every_channel_stops_at_its_own_end():
    op = convolution(Conv(), (1, 8, 8, 32), 32, ("uint8", "uint8"), 3)
    high = np.arange(32, dtype=np.float32)
    op = replace(op, key=replace(op.key, clips_channels=True), constants=op.constants | {"clip_high": high})
    op.constants["integers"][2:] = 100, 0, 255
    op.constants["multiplier"][:] = 1
    np.abs(op.constants["weight"], out=op.constants["weight"])
    found = run_kernel(op, random_inputs(np.random.default_rng(0), op.key), target_named("host"))
    np.testing.assert_array_equal(found.max((0, 1, 2)), 100 + np.arange(32))
