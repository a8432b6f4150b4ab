"""Compiled concatenations and selections of channels against the NumPy reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_runner import TARGETS, make_op, random_inputs, run_kernel, target_named

from qsearch.kernels.cpu.select import Stretch, stretches
from qsearch.quantize.lower_nodes import scalars
from qsearch.quantize.program import OpKey
from qsearch.quantize.reference import run_op

RELAXED = settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def selections(draw):
    """Widths of the inputs and the selected channels: slices of a shuffle, a stride, or anything."""
    widths = draw(st.lists(st.integers(1, 70), min_size=1, max_size=4))
    total = sum(widths)
    kind = draw(st.sampled_from(["shuffle", "slice", "stride", "any", "all"]))
    channels = list(range(total))
    if kind == "shuffle":
        groups = draw(st.integers(2, 4))
        each = -(-total // groups)
        channels = [g * each + i for i in range(each) for g in range(groups) if g * each + i < total]
    elif kind == "stride":
        channels = channels[:: draw(st.integers(1, 3))]
    elif kind == "any":
        channels = draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=40))
    if kind in ("shuffle", "slice"):
        start = draw(st.integers(0, total - 1))
        channels = channels[start : draw(st.integers(start + 1, total))]
    return tuple(widths), None if kind == "all" else tuple(channels)


@RELAXED
@given(case=selections())
def test_stretches_cover_the_selection_in_order(case):
    widths, channels = case
    origin = [(i, channel) for i, width in enumerate(widths) for channel in range(width)]
    wanted = origin if channels is None else [origin[channel] for channel in channels]
    found = stretches(widths, channels)
    written = [(i, first + step) for s in found for step in range(s.length) for i, first in s.streams]
    assert written == wanted
    assert [s.start for s in found] == list(np.cumsum([0, *(s.length * len(s.streams) for s in found)])[:-1])


def test_half_of_a_shuffle_of_two_inputs_is_one_interleave():
    shuffled = tuple(group * 58 + i for i in range(58) for group in range(2))
    assert stretches((58, 58), shuffled[:58]) == [Stretch(0, 29, ((0, 0), (1, 0)))]
    assert stretches((58, 58), shuffled[58:]) == [Stretch(0, 29, ((0, 29), (1, 29)))]
    assert stretches((5, 7), None) == [Stretch(0, 5, ((0, 0),)), Stretch(5, 7, ((1, 0),))]


@pytest.mark.parametrize("target", TARGETS)
@RELAXED
@given(case=selections(), pixels=st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 3)), data=st.data())
def test_integer_selection_is_exact(target, case, pixels, data):
    widths, channels = case
    shapes = (*((*pixels, width) for width in widths), (*pixels, len(channels) if channels else sum(widths)))
    copies = tuple(data.draw(st.booleans()) for _ in widths)
    key = OpKey("concat", shapes, ("uint8",) * len(shapes), copies=copies, channels=channels)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    op = make_op(
        key,
        multipliers=(2 * rng.random(len(widths))).astype(np.float32),
        zero_points=rng.integers(0, 256, len(widths)).astype(np.int32),
        **scalars(zero_point=int(rng.integers(0, 256)), qmin=3, qmax=240),
    )
    inputs = random_inputs(rng, key)
    np.testing.assert_array_equal(run_kernel(op, inputs, target_named(target)), run_op(op, inputs))


@pytest.mark.parametrize("target", TARGETS)
@RELAXED
@given(case=selections(), features=st.booleans())
def test_float_selection_is_exact(target, case, features):
    widths, channels = case
    pixels = (2,) if features else (1, 3, 2)
    shapes = (*((*pixels, width) for width in widths), (*pixels, len(channels) if channels else sum(widths)))
    key = OpKey("concat", shapes, ("float32",) * len(shapes), copies=(True,) * len(widths), channels=channels)
    count = len(widths)
    op = make_op(key, multipliers=np.ones(count, np.float32), zero_points=np.zeros(count, np.int32))
    inputs = random_inputs(np.random.default_rng(1), key)
    np.testing.assert_array_equal(run_kernel(op, inputs, target_named(target)), run_op(op, inputs))
