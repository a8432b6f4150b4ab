"""Calibration mode percentile: cut each side at a percentile of the values."""

from __future__ import annotations

import math

import numpy as np

from qsearch.calibrate.histogram import HALF, TensorStatistics

__all__ = ["percentile_range"]


def percentile_range(statistics: TensorStatistics, percentile: float) -> tuple[float, float]:
    """Cut the upper side at the percentile and the lower side at its mirror.

    A few outliers should not cost every other value its resolution (Wu et al. 2020, "Integer quantization for
    deep learning inference", arXiv:2004.09602, section 5.1).

    Args:
        statistics: Of the tensor.
        percentile: Share of the values at or below the upper end, in percent, 50 to 100.

    Returns:
        (low, high) with low <= 0 <= high; a side without values ends exactly at 0.
    """
    low = min(_quantile(statistics, 1 - percentile / 100), 0.0)
    high = max(_quantile(statistics, percentile / 100), 0.0)
    if max(-low, high) <= statistics.histogram.width:
        # Nearly all values are zero: the percentile would cut away all that the tensor says.
        return min(statistics.minimum, 0.0), max(statistics.maximum, 0.0)
    return low, high


def _quantile(statistics: TensorStatistics, share: float) -> float:
    """numpy.quantile (linear) of the recorded values, to within one bin."""
    rank = share * (statistics.count - 1)
    below = math.floor(rank)
    # Rounding in 1 - p / 100 must not move the outermost rank inwards or outwards.
    weight = 0.0 if math.isclose(rank, round(rank), abs_tol=1e-9) else rank - below
    below = round(rank) if weight == 0.0 else below
    return (1 - weight) * _ranked(statistics, below) + weight * _ranked(statistics, below + (weight > 0))


def _ranked(statistics: TensorStatistics, rank: int) -> float:
    """The value of this rank, counted from 0, taking the values of a bin as evenly spread."""
    if rank == 0:
        return statistics.minimum
    if rank == statistics.count - 1:
        return statistics.maximum
    counts = statistics.histogram.counts
    cumulative = np.cumsum(counts)
    position = int(np.searchsorted(cumulative, rank, side="right"))
    inside = (rank - (cumulative[position] - counts[position]) + 0.5) / counts[position]
    value = (position - HALF + inside) * statistics.histogram.width
    return float(min(max(value, statistics.minimum), statistics.maximum))
