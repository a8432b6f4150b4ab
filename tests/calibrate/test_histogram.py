"""The growing histogram against NumPy, and the exactness of merging."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from qsearch.calibrate.histogram import BINS, HALF, Histogram, TensorStatistics, channel_extremes

# Eighty powers of two apart at most: a value is scaled by the bin width, and must not underflow.
FLOATS = st.one_of(st.just(0.0), st.floats(2.0**-40, 2.0**40, width=32), st.floats(-(2.0**40), -(2.0**-40), width=32))
BATCHES = st.lists(arrays(np.float32, array_shapes(max_dims=1, max_side=40), elements=FLOATS), min_size=1, max_size=5)


def histogram_of(*batches: np.ndarray) -> Histogram:
    histogram = Histogram.empty()
    for batch in batches:
        histogram = histogram.extended(batch, float(batch.min()), float(batch.max()))
    return histogram


@settings(max_examples=60, deadline=None)
@given(BATCHES)
def test_batches_count_as_their_union_does_in_numpy(batches: list[np.ndarray]) -> None:
    histogram = histogram_of(*batches)
    edges = np.arange(-HALF, HALF + 1) * histogram.width
    expected, _ = np.histogram(np.concatenate(batches).astype(np.float64), edges)
    np.testing.assert_array_equal(histogram.counts, expected)


@settings(max_examples=60, deadline=None)
@given(BATCHES, BATCHES)
def test_merging_equals_extending_in_any_order(first: list[np.ndarray], second: list[np.ndarray]) -> None:
    merged = histogram_of(*first).merged(histogram_of(*second))
    extended = histogram_of(*reversed(first + second))
    assert merged.exponent == extended.exponent
    np.testing.assert_array_equal(merged.counts, extended.counts)


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-3.7, 0.0), (-1e-6, 2e-6), (-1.0, 1e20), (0.0, 4096.0), (-4096.0, 0.0)])
def test_used_range_has_at_least_2048_bins(low: float, high: float) -> None:
    histogram = histogram_of(np.array([low, high], np.float32))
    occupied = np.flatnonzero(histogram.counts)
    assert 2048 <= occupied[-1] - occupied[0] <= BINS
    assert histogram.centers[occupied[-1]] == pytest.approx(high, abs=histogram.width)


def test_long_arrays_are_binned_across_chunks() -> None:
    values = np.linspace(-1, 3, 200_001, dtype=np.float32)
    histogram = histogram_of(values)
    assert histogram.count == values.size
    assert histogram.counts[HALF:].sum() == (values >= 0).sum()


def test_all_zeros_fall_into_the_bin_above_zero() -> None:
    histogram = histogram_of(np.zeros(5, np.float32), np.array([-8.0, 1.0], np.float32))
    assert histogram.counts[HALF] == 5
    assert histogram.count == 7


def test_channel_extremes_follow_axis_one_in_any_memory_layout() -> None:
    values = torch.randn(3, 5, 4, 6)
    for layout in (torch.contiguous_format, torch.channels_last):
        low, high = channel_extremes(values.contiguous(memory_format=layout))
        np.testing.assert_array_equal(low, values.amin((0, 2, 3)).numpy())
        np.testing.assert_array_equal(high, values.amax((0, 2, 3)).numpy())
    assert channel_extremes(torch.tensor([1.0, -2.0])) == (-2.0, 1.0)


def test_channel_extremes_pass_nan_on() -> None:
    low, high = channel_extremes(torch.tensor([[1.0, float("nan")], [2.0, 3.0]]))
    assert np.isnan([low[1], high[1]]).all()
    assert (low[0], high[0]) == (1.0, 2.0)


def test_statistics_of_batches_merge() -> None:
    batches = [torch.randn(2, 3, 4, 5), 10 * torch.randn(2, 3, 4, 5)]
    parts = [TensorStatistics.empty(3).extended(batch, *channel_extremes(batch)) for batch in batches]
    merged = parts[0].merged(parts[1])
    both = torch.cat(batches)
    assert merged.count == both.numel()
    assert (merged.minimum, merged.maximum) == (both.min().item(), both.max().item())
    np.testing.assert_array_equal(merged.channel_maximum, both.amax((0, 2, 3)).numpy())
    np.testing.assert_allclose(merged.channel_mean, both.double().mean((0, 2, 3)).numpy(), rtol=1e-9)
