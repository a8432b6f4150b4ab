"""What is remembered of a tensor: a histogram that grows with its range, and exact extremes.

Bins are a power of two wide and aligned at zero, so that zero is an edge, binning a float32 is exact (a
negative value that underflows when divided by the width counts as zero), and doubling the width merges pairs
of bins exactly: the histogram of many batches is the histogram of their union, whatever their order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

__all__ = ["BINS", "HALF", "Histogram", "TensorStatistics", "channel_extremes"]

# Half the bins lie on each side of zero; the larger side always uses more than half of its own, so at least
# 2048 bins cover the used range.
BINS = 8192
HALF = BINS // 2
_HALF_BITS = HALF.bit_length() - 1
# Keeps 2 ** -exponent a normal float32.
_SMALLEST_EXPONENT = -100
# Elements binned at a time: the chunk and its bin numbers stay in the L2 cache.
_CHUNK = 1 << 16


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of values; bin k holds [k, k + 1) * 2 ** exponent for -HALF <= k < HALF.

    Attributes:
        exponent: Base-two logarithm of the bin width.
        counts: int64 (BINS,), bin k at position k + HALF.
    """

    exponent: int
    counts: np.ndarray

    @classmethod
    def empty(cls) -> Histogram:
        """A histogram of no values, at the finest resolution."""
        return cls(_SMALLEST_EXPONENT, np.zeros(BINS, np.int64))

    @property
    def width(self) -> float:
        """Width of a bin, in the tensor's unit."""
        return 2.0**self.exponent

    @cached_property
    def count(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    @property
    def centers(self) -> np.ndarray:
        """Middle of every bin, float64 (BINS,)."""
        return (np.arange(-HALF, HALF) + 0.5) * self.width

    def coarsened(self, exponent: int) -> Histogram:
        """The same values in bins 2 ** exponent wide, at least as wide as now."""
        # Twelve doublings leave one bin on each side of zero; more change nothing.
        doublings = min(exponent - self.exponent, _HALF_BITS)
        if doublings == 0:
            return self if exponent == self.exponent else Histogram(exponent, self.counts)
        merged = self.counts.reshape(-1, 1 << doublings).sum(axis=1)
        counts = np.zeros_like(self.counts)
        counts[HALF - len(merged) // 2 : HALF + len(merged) // 2] = merged
        return Histogram(exponent, counts)

    def merged(self, other: Histogram) -> Histogram:
        """The histogram of both sets of values."""
        exponent = max(self.exponent, other.exponent)
        return Histogram(exponent, self.coarsened(exponent).counts + other.coarsened(exponent).counts)

    def extended(self, values: np.ndarray, low: float, high: float) -> Histogram:
        """Add values.

        Args:
            values: Finite float32, any shape, contiguous.
            low: Their minimum.
            high: Their maximum.

        Returns:
            The histogram of the old and the new values.
        """
        # frexp gives |x| < 2 ** power, hence |x| / width < HALF.
        power = math.frexp(max(-low, high))[1]
        grown = self.coarsened(max(self.exponent, power - _HALF_BITS))
        flat = values.reshape(-1)
        inverse = np.float32(2.0**-grown.exponent)
        counts = grown.counts.copy()
        for start in range(0, flat.size, _CHUNK):
            # Floor before the shift to positive: the other order would round small negatives into bin 0.
            bins = np.floor(flat[start : start + _CHUNK] * inverse).astype(np.int64)
            bins += HALF
            counts += np.bincount(bins, minlength=BINS)
        return Histogram(grown.exponent, counts)


@dataclass(frozen=True, eq=False)
class TensorStatistics:
    """Everything recorded of one tensor.

    Attributes:
        histogram: Counts of all values.
        channel_minimum: float32 (C,), smallest value per channel (axis 1; the last of tokens (N, T, C)).
        channel_maximum: float32 (C,), largest value per channel.
        channel_sum: float64 (C,), sum of the values per channel.
    """

    histogram: Histogram
    channel_minimum: np.ndarray
    channel_maximum: np.ndarray
    channel_sum: np.ndarray

    @property
    def minimum(self) -> float:
        """Smallest value."""
        return float(self.channel_minimum.min())

    @property
    def maximum(self) -> float:
        """Largest value."""
        return float(self.channel_maximum.max())

    @property
    def count(self) -> int:
        """Number of values."""
        return self.histogram.count

    @property
    def channel_mean(self) -> np.ndarray:
        """Mean value per channel, float64 (C,)."""
        return self.channel_sum * (len(self.channel_sum) / max(self.count, 1))

    def merged(self, other: TensorStatistics) -> TensorStatistics:
        """The statistics of both sets of values."""
        return TensorStatistics(
            self.histogram.merged(other.histogram),
            np.minimum(self.channel_minimum, other.channel_minimum),
            np.maximum(self.channel_maximum, other.channel_maximum),
            self.channel_sum + other.channel_sum,
        )

    def extended(self, values: torch.Tensor, low: np.ndarray, high: np.ndarray) -> TensorStatistics:
        """Add a batch.

        Args:
            values: Finite float32, channels of length C.
            low: Its minimum per channel, as `channel_extremes` finds it.
            high: Its maximum per channel.

        Returns:
            The statistics of the old and the new values.
        """
        return TensorStatistics(
            self.histogram.extended(_rows(values).numpy(), float(low.min()), float(high.max())),
            np.minimum(self.channel_minimum, low),
            np.maximum(self.channel_maximum, high),
            self.channel_sum + _rows(values).sum(0, dtype=torch.float64).numpy(),
        )

    @classmethod
    def empty(cls, channels: int) -> TensorStatistics:
        """Statistics of no values."""
        low, high = np.full(channels, np.inf, np.float32), np.full(channels, -np.inf, np.float32)
        return cls(Histogram.empty(), low, high, np.zeros(channels))


def channel_extremes(values: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Find the extremes per channel, axis 1 of images and features, the last axis of tokens; without either, one channel.

    Args:
        values: float32, at least one value. NaN is passed on to the channel's extremes.

    Returns:
        Minimum and maximum, float32 (C,) each.
    """
    rows = _rows(values)
    # Two passes: torch's joint aminmax is several times slower along axis 0.
    return rows.amin(0).numpy(), rows.amax(0).numpy()


def _rows(values: torch.Tensor) -> torch.Tensor:
    """View as (values per channel, C); without a copy if the memory is channels-last."""
    if values.dim() < 2:
        return values.reshape(-1, 1)
    if values.dim() == 3:
        return values.reshape(-1, values.shape[-1])
    return values.movedim(1, -1).reshape(-1, values.shape[1])
