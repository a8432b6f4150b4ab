"""Calibration mode mse: the range of least expected squared error."""

from __future__ import annotations

import numpy as np

from qsearch.calibrate.histogram import TensorStatistics

__all__ = ["mse_range", "quantization_error"]

_STEPS = 255
# Each side is shrunk by these factors, 3 % apart, down to 1/32.
_FACTORS = np.geomspace(1.0, 1 / 32, 120)
# Candidates that are evaluated bin by bin after the screening.
_SHORTLIST = 8


def mse_range(statistics: TensorStatistics) -> tuple[float, float]:
    """Choose both ends so that 8-bit affine quantization has the least expected squared error.

    Rounding error falls and clipping error grows as the range shrinks (Nagel et al. 2021, "A white paper on
    neural network quantization", arXiv:2106.08295, section 3.1). All pairs of ends are screened with rounding
    error taken as step ** 2 / 12; the best of them and the full range are then evaluated on the histogram.

    Args:
        statistics: Of the tensor.

    Returns:
        (low, high) with low <= 0 <= high.
    """
    full = min(statistics.minimum, 0.0), max(statistics.maximum, 0.0)
    values, counts = _points(statistics)
    if full[1] - full[0] == 0.0:
        return full
    lows = full[0] * _FACTORS if full[0] < 0 else np.zeros(1)
    highs = full[1] * _FACTORS if full[1] > 0 else np.zeros(1)
    screened = _screen(values, counts, lows, highs)
    best = np.argsort(screened, axis=None, kind="stable")[:_SHORTLIST]
    rows, columns = np.unravel_index(best, screened.shape)
    # The full range comes first and wins ties.
    low, high = np.r_[full[0], lows[rows]], np.r_[full[1], highs[columns]]
    winner = int(np.argmin(quantization_error(values, counts, low, high)))
    return float(low[winner]), float(high[winner])


def _points(statistics: TensorStatistics) -> tuple[np.ndarray, np.ndarray]:
    """One value for every occupied bin, float64 (M,), ascending, and its count, float64 (M,)."""
    counts = statistics.histogram.counts
    occupied = np.flatnonzero(counts)
    values = statistics.histogram.centers[occupied].clip(statistics.minimum, statistics.maximum)
    if statistics.minimum >= 0.0:
        # After a ReLU the first bin is almost all exact zeros.
        values[values < statistics.histogram.width] = 0.0
    return values, counts[occupied].astype(np.float64)


def _screen(values: np.ndarray, counts: np.ndarray, lows: np.ndarray, highs: np.ndarray) -> np.ndarray:
    """Approximate summed squared error of every pair of ends, float64 (len(lows), len(highs))."""
    moments = np.stack([counts, counts * values, counts * values**2])
    prefix = np.concatenate([np.zeros((3, 1)), np.cumsum(moments, axis=1)], axis=1)
    below = prefix[:, np.searchsorted(values, lows, side="left")]
    above = prefix[:, -1:] - prefix[:, np.searchsorted(values, highs, side="right")]
    clipped = _clipping(below, lows)[:, None] + _clipping(above, highs)[None, :]
    zeros = counts[values == 0.0].sum()
    inside = prefix[0, -1] - zeros - below[0][:, None] - above[0][None, :]
    step = (highs[None, :] - lows[:, None]) / _STEPS
    return inside * step**2 / 12 + clipped


def _clipping(outside: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Sum of (x - end) ** 2 from the count, sum and sum of squares of the values outside."""
    return outside[2] - 2 * end * outside[1] + end**2 * outside[0]


def quantization_error(values: np.ndarray, counts: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Mean squared error of 8-bit affine quantization.

    Args:
        values: float64 (M,).
        counts: float64 (M,), how often each value occurs.
        low: float64 (K,), lower ends, at most 0.
        high: float64 (K,), upper ends, at least 0.

    Returns:
        float64 (K,), in the values' unit squared.
    """
    step = ((high - low) / _STEPS)[:, None]
    zero_point = np.rint(-low[:, None] / step)
    restored = (np.clip(np.rint(values / step) + zero_point, 0, _STEPS) - zero_point) * step
    return (restored - values) ** 2 @ counts / counts.sum()
