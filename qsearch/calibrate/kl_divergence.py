"""Calibration mode kl_divergence: the range whose 256 levels say most about the distribution."""

from __future__ import annotations

import numpy as np

from qsearch.calibrate.histogram import HALF, Histogram, TensorStatistics

__all__ = ["kl_divergence_range"]

_LEVELS = 256
_CANDIDATES = 256
# Share of the quantized distribution spread evenly, so that an empty bin has a finite divergence.
_SMOOTHING = 1e-4
# With fewer values per bin the divergence measures sampling noise and favours ever narrower ranges.
_VALUES_PER_BIN = 16
_FEWEST_BINS = 4 * _LEVELS


def kl_divergence_range(statistics: TensorStatistics) -> tuple[float, float]:
    """Choose the clipping thresholds that lose the least information.

    Entropy calibration (Migacz 2017, "8-bit inference with TensorRT"): the reference P is the histogram inside
    the threshold with the clipped mass on its edge bin, Q is the same histogram without that mass, averaged
    over the occupied bins of every level; the threshold of least KL(P || Q) wins. Levels here span an affine
    range, so a tensor without negative values spends all 256 above zero; with both signs, one threshold on
    the magnitude is chosen first, then each side is cut on its own.

    Args:
        statistics: Of the tensor.

    Returns:
        (low, high) with low <= 0 <= high.
    """
    histogram = _readable(statistics.histogram)
    counts = _without_zeros(histogram)
    occupied = np.flatnonzero(histogram.counts)
    first, last = min(int(occupied[0]), HALF), max(int(occupied[-1]) + 1, HALF)
    full = min(statistics.minimum, 0.0), max(statistics.maximum, 0.0)
    start, stop = np.array([first]), np.array([last])
    reach = _steps(max(HALF - first, last - HALF))
    if first < HALF < last:
        start, stop = _best(counts, np.maximum(HALF - reach, first), np.minimum(HALF + reach, last))
    if last > HALF:
        stops = HALF + _steps(int(stop[0]) - HALF)
        start, stop = _best(counts, np.repeat(start, len(stops)), stops)
    if first < HALF:
        starts = HALF - _steps(HALF - int(start[0]))
        start, stop = _best(counts, starts, np.repeat(stop, len(starts)))
    low, high = (np.array([start[0], stop[0]]) - HALF) * histogram.width
    return float(max(low, full[0])), float(min(high, full[1]))


def _readable(histogram: Histogram) -> Histogram:
    """Merge bins until they hold enough values for their heights to mean something."""
    bins = int(np.ptp(np.flatnonzero(histogram.counts))) + 1
    doublings = 0
    while bins >> doublings > _FEWEST_BINS and histogram.count < _VALUES_PER_BIN * (bins >> doublings):
        doublings += 1
    return histogram.coarsened(histogram.exponent + doublings)


def _without_zeros(histogram: Histogram) -> np.ndarray:
    """Counts, float64, with the bin of exact zeros no higher than its neighbours.

    Every affine range represents zero exactly; left in, the many zeros after a ReLU would be spread over their
    level and drown all else.
    """
    counts = histogram.counts.astype(np.float64)
    counts[HALF] = min(counts[HALF], max(counts[HALF - 1], counts[HALF + 1]))
    return counts


def _steps(reach: int) -> np.ndarray:
    """Candidate distances from zero in bins, widest first, so that the widest of equals is chosen."""
    return np.unique(np.linspace(reach, min(reach, _LEVELS // 2), _CANDIDATES).astype(np.int64))[::-1]


def _best(counts: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The window of least divergence; the first, which is the widest, where none has a bin per level."""
    wide = stops - starts >= _LEVELS
    if not wide.any():
        return starts[:1], stops[:1]
    starts, stops = starts[wide], stops[wide]
    winner = int(np.argmin(_divergence(counts, starts, stops)))
    return starts[winner : winner + 1], stops[winner : winner + 1]


def _divergence(counts: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """KL(P || Q) of every window of bins [start, stop), float64 (K,).

    Q is constant over the occupied bins of a level, so sums over bins reduce to differences of running sums at
    the edges of the 256 levels.
    """
    total = counts.sum()
    length = stops - starts
    edges = starts[:, None] - (-np.arange(_LEVELS + 1) * length[:, None] // _LEVELS)
    mass = np.diff(_running(counts)[edges], axis=1)
    occupied = np.diff(_running(counts > 0)[edges], axis=1)
    even = _SMOOTHING / length[:, None]
    inside = np.maximum(mass.sum(axis=1, keepdims=True), 1.0)
    quantized = (1 - _SMOOTHING) * mass / (np.maximum(occupied, 1) * inside) + even
    self_information = _running(_x_log_x(counts))
    divergence = self_information[stops] - self_information[starts] - (mass * np.log(quantized)).sum(axis=1)
    clipped_low, clipped_high = _running(counts)[starts], total - _running(counts)[stops]
    for clipped, edge, level in ((clipped_low, starts, 0), (clipped_high, stops - 1, _LEVELS - 1)):
        edge_share = np.where(counts[edge] > 0, quantized[:, level], even[:, 0])
        divergence += _x_log_x(counts[edge] + clipped) - _x_log_x(counts[edge]) - clipped * np.log(edge_share)
    return divergence / total - np.log(total)


def _running(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(values)])


def _x_log_x(values: np.ndarray) -> np.ndarray:
    return values * np.log(np.maximum(values, 1.0))
