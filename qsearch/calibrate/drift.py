"""How far the values of a tensor have moved from those of calibration, and how far chance moves them.

The population stability index of two histograms is the sum over bins of (p - q) ln(p / q): Kullback-Leibler divergence
both ways (Lewis, An Introduction to Credit Scoring, 1994; common practice calls less than 0.1 no shift). Bins hold equal
parts of the reference, and what lies beyond it, which is what a calibrated range clips, has bins of its own.

Values of one image are not independent, so that no formula says what the index is without a shift; it is measured, on
draws of calibration images. Its mean falls with the number of images (Yurdakul and Naranjo, Statistical Properties of
the Population Stability Index, 2020): noise * (1 / images + 1 / reference images).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["LEAST_INDEX", "DriftReference", "stability_index"]

# Bins of the middle of a reference; either tail beyond has one more.
BINS, TAIL = 16, 1e-3
# No bin counts as less likely than this.
FLOOR = 1e-4
# Below this, no shift, however surely it is there.
LEAST_INDEX = 0.1
# Draws of so many images each that measure what chance does, and the part of them that may exceed the threshold.
DRAWS, DRAWN = 400, 32
FALSE_ALARMS = 0.01


@dataclass(frozen=True, eq=False)
class DriftReference:
    """What values are compared with.

    Attributes:
        counts: How often a value holds each integer, (values, levels).
        images: Images that were counted.
        noise: Index times images without a shift, its mean, (values,).
        alarm: How often its mean the largest index of all values is without a shift, at most in 99 of 100 draws.
    """

    counts: np.ndarray
    images: int
    noise: np.ndarray
    alarm: float

    @classmethod
    def of_images(cls, counts: np.ndarray, seed: int = 0) -> DriftReference:
        """Make a reference, and measure what chance does by drawing of its images.

        Args:
            counts: Of every image, (images, values, levels).
            seed: Of the draws.
        """
        whole = counts.sum(0, dtype=np.int64)
        random = np.random.default_rng(seed)
        weights = random.multinomial(DRAWN, np.full(len(counts), 1 / len(counts)), DRAWS).astype(np.float32)
        index = np.zeros((len(whole), DRAWS))
        for value, mine in enumerate(whole):
            index[value] = _index(_binned(mine, mine), weights @ _binned(mine, counts[:, value]))
        noise = index.mean(1) * DRAWN
        certain = noise > 0
        if not certain.any():
            return cls(whole, len(counts), noise, 1.0)
        largest = (index[certain] * DRAWN / noise[certain, None]).max(0)
        return cls(whole, len(counts), noise, float(np.quantile(largest, 1 - FALSE_ALARMS)))

    def thresholds(self, images: int) -> np.ndarray:
        """Index above which a value has moved, (values,).

        Args:
            images: Images that were counted to be compared.
        """
        return np.maximum(LEAST_INDEX, self.alarm * self.noise * (1 / max(images, 1) + 1 / max(self.images, 1)))

    def index(self, counts: np.ndarray) -> np.ndarray:
        """Stability index of every value, (values,).

        Args:
            counts: How often each holds each integer, (values, levels).
        """
        return np.array([stability_index(mine, given) for mine, given in zip(self.counts, counts, strict=True)])


def stability_index(reference: np.ndarray, counts: np.ndarray) -> float:
    """Population stability index of two histograms over the same levels; zero where one of them is empty."""
    if not reference.any() or not counts.any():
        return 0.0
    return float(_index(_binned(reference, reference), _binned(reference, counts)))


def _binned(reference: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Counts (..., levels) in the bins of a reference, float32 (..., bins)."""
    middle = (np.cumsum(reference) - reference / 2) / max(reference.sum(), 1)
    inside = 1 + np.minimum((middle * BINS).astype(np.int64), BINS - 1)
    places = np.where(middle < TAIL, 0, np.where(middle > 1 - TAIL, BINS + 1, inside))
    bins = np.zeros((len(reference), BINS + 2), np.float32)
    bins[np.arange(len(reference)), places] = 1
    return np.asarray(counts.astype(np.float32) @ bins)


def _index(reference: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Index of binned counts (..., bins)."""
    p, q = (np.maximum(one / np.maximum(one.sum(-1, keepdims=True), 1), FLOOR) for one in (reference, counts))
    return np.asarray(((q - p) * np.log(q / p)).sum(-1))
