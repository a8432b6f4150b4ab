"""Scales and zero points from what was counted.

All values get new ones once any has moved: what one of them clips changes all that follow it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qsearch.quantize.affine import affine_from_range

__all__ = ["Scales", "covered_steps", "least_error_range", "proposed_scales"]

# (scale, zero point) of every value of a record.
Scales = list[tuple[float, int]]
# A scale shrinks to so much of itself at most: a short recording need not have seen what comes next.
LEAST_SHRINK = 0.25


def proposed_scales(record: dict[str, Any], counts: np.ndarray) -> Scales:
    """New scales for all values that can have other ones.

    Args:
        record: Of the bundle.
        counts: Recorded, (values, 256), in integers of the module with wider ranges.
    """
    scales: Scales = [(value["scale"], value["zero_point"]) for value in record["values"]]
    for number, value in enumerate(record["values"]):
        if value["replaceable"] and counts[number].any():
            low, high = least_error_range(counts[number], value["wide_scale"], value["wide_zero_point"])
            scales[number] = scale_of_range(value, low, high)
    return scales


def scale_of_range(value: dict[str, Any], low: float, high: float) -> tuple[float, int]:
    """Scale and zero point that hold a range, within what the value can be."""
    if value["clip"] is not None:
        least, most = (end if end is not None else edge for end, edge in zip(value["clip"], (-np.inf, np.inf), strict=True))
        low, high = max(low, least), min(high, most)
    span = LEAST_SHRINK * 255 * value["scale"]
    if high - low < span:
        grown = span / max(high - low, 1e-30)
        low, high = (low * grown, high * grown) if high > low else (0.0, span)
    affine = affine_from_range(value["name"], low, high)
    return float(affine.scale), affine.zero_point


def least_error_range(counts: np.ndarray, scale: float, zero_point: int) -> tuple[float, float]:
    """The range whose 255 steps lose least, rounding and clipping together, in mean squares.

    Args:
        counts: How often each integer occurs, (256,).
        scale: Of these integers.
        zero_point: Of these integers.

    Returns:
        (low, high) with low <= 0 <= high.
    """
    steps = np.arange(len(counts)) - zero_point
    share = counts / counts.sum()
    least, most = covered_steps(counts, zero_point)
    below = range(zero_point + least, zero_point + 1)
    above = range(zero_point, zero_point + most + 1)
    # What clipping at each level costs, in squared steps.
    under = np.array([(share * np.square(np.minimum(steps - steps[level], 0))).sum() for level in below])
    over = np.array([(share * np.square(np.maximum(steps - steps[level], 0))).sum() for level in above])
    span = np.array(above)[None, :] - np.array(below)[:, None]
    error = np.square(span / 255) / 12 + under[:, None] + over[None, :]
    i, j = np.unravel_index(int(error.argmin()), error.shape)
    return float(steps[below[i]] * scale), float(steps[above[j]] * scale)


def covered_steps(counts: np.ndarray, zero_point: int) -> tuple[int, int]:
    """The least and the largest integer that was counted, from the zero point on, which lies between them."""
    used = np.flatnonzero(counts)
    return (int(min(used[0] - zero_point, 0)), int(max(used[-1] - zero_point, 0))) if len(used) else (0, 0)
