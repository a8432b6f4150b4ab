"""The stability index: nothing for the same values, more for a shift, seldom an alarm by chance."""

import numpy as np
import pytest

from qsearch.calibrate.drift import FALSE_ALARMS, LEAST_INDEX, DriftReference, stability_index


def histogram(values):
    return np.bincount(np.clip(np.rint(values), 0, 255).astype(int), minlength=256)


def images(count, seed, shift=0.0):
    """Histograms of two values, whose elements are alike within an image."""
    random = np.random.default_rng(seed)
    middles = random.normal(120 + shift, 12, (count, 2, 1))
    return np.stack([[histogram(random.normal(m, 10, 400)) for m in row] for row in middles])


def test_the_same_values_have_no_index_and_shifted_ones_do():
    values = np.random.default_rng(0).normal(100, 10, 100_000)
    near, far = histogram(values + 1), histogram(values + 10)
    assert stability_index(histogram(values), histogram(values)) == pytest.approx(0, abs=1e-6)
    assert 0 < stability_index(histogram(values), near) < LEAST_INDEX < stability_index(histogram(values), far)


def test_what_lies_beyond_the_reference_has_bins_of_its_own():
    """Five of a hundred values beyond a calibrated range are a shift, however many share its last bin."""
    reference = histogram(np.random.default_rng(0).uniform(0, 60, 100_000))
    counts = reference.astype(float) * 0.95
    counts[80] = 0.05 * reference.sum()
    assert stability_index(reference, counts) > LEAST_INDEX


def test_empty_histograms_have_no_index():
    assert stability_index(np.zeros(256, int), histogram(np.ones(3))) == 0
    found = DriftReference.of_images(np.zeros((4, 2, 256), int))
    assert (found.index(np.ones((2, 256))) == 0).all() and (found.thresholds(10) == LEAST_INDEX).all()


def test_thresholds_keep_what_chance_does_below_them():
    reference = DriftReference.of_images(images(200, 0))
    alarms = 0
    for seed in range(1, 101):
        found = reference.index(images(16, seed).sum(0))
        alarms += bool((found > reference.thresholds(16)).any())
    # One in a hundred was asked for.
    assert alarms <= 5 and FALSE_ALARMS == 0.01
    assert (reference.index(images(16, 0, 40.0).sum(0)) > reference.thresholds(16)).all()
    assert (reference.thresholds(8) > reference.thresholds(64)).all()
