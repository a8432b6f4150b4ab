"""The sensitivity table as a sum over layers and pairs of them."""

import itertools

import numpy as np
import pytest

from qsearch.config import QuantConfig
from qsearch.search.tables.divergence import MOST_TAKEN, divergence_sum
from qsearch.search.tables.sensitivity_table import Sensitivity

LAYERS = {"a": ("fp32", "int8", "w4a8"), "b": ("fp32", "int8"), "c": ("fp32", "int8", "w4a8")}


def table(samples):
    """A table whose s are given: (pairs of layer and precision, samples); all in the rounded weights."""
    weight = np.array(samples, np.float32)[None]
    return Sensitivity(LAYERS, (QuantConfig().ranges_key(),), (QuantConfig().weights_key(),), np.zeros_like(weight), weight)


def second_order(samples, row):
    """Half the mean square of the sum of s."""
    starts = np.cumsum([0, *(len(names) - 1 for names in LAYERS.values())])
    chosen = [samples[starts[i] + value - 1] for i, value in enumerate(row) if value]
    return 0.5 * np.mean(np.sum(chosen, axis=0) ** 2) if chosen else 0.0


EVERY = np.array(list(itertools.product(range(3), range(2), range(3))))


def test_with_all_pairs_it_is_the_second_order_divergence():
    # Errors that add up: no coupling takes anything away.
    samples = np.abs(np.random.default_rng(0).normal(size=(5, 64)))
    found = divergence_sum(table(samples), QuantConfig(), [(0, 1), (0, 2), (1, 2)])
    np.testing.assert_allclose(found(EVERY), [second_order(samples, row) for row in EVERY], rtol=1e-5, atol=1e-9)


def test_without_pairs_it_is_the_sum_of_the_layers():
    samples = np.random.default_rng(1).normal(size=(5, 64))
    found = divergence_sum(table(samples), QuantConfig(), [])
    assert not found.pairs
    for row in EVERY:
        alone = sum(second_order(samples, [value if k == i else 0 for k in range(3)]) for i, value in enumerate(row))
        assert found(row[None])[0] == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_negative_couplings_never_outweigh_the_layers(seed):
    rng = np.random.default_rng(seed)
    # Each layer undoes most of what the others do.
    samples = rng.normal(size=64) * np.array([[1.0], [2.0], [-1.0], [-1.5], [-3.0]]) + 0.1 * rng.normal(size=(5, 64))
    pairs = [(0, 1), (0, 2), (1, 2)]
    found, alone = (divergence_sum(table(samples), QuantConfig(), some)(EVERY) for some in (pairs, []))
    assert (found >= (1 - MOST_TAKEN) * alone - 1e-9).all()
    assert (found < 0.9 * alone).any()
