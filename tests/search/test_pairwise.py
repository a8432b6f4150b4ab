"""Pairwise sums and their exact minimum."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qsearch.search.tables import pairwise
from qsearch.search.tables.pairwise import PairwiseSum, each_in, minimize


def random_sum(rng, sizes, share):
    pairs = {
        (i, j): rng.normal(size=(sizes[i], sizes[j]))
        for i, j in itertools.combinations(range(len(sizes)), 2)
        if rng.random() < share
    }
    return PairwiseSum(tuple(rng.normal(size=size) for size in sizes), pairs, float(rng.normal()))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.floats(0, 1), st.integers(0, 10**6))
def test_the_minimum_is_exact(sizes, share, seed):
    rng = np.random.default_rng(seed)
    sums = [random_sum(rng, sizes, share) for _ in range(2)]
    weights = rng.random((5, 2)) + 0.1
    every = np.array(list(itertools.product(*map(range, sizes))))
    values = weights @ np.stack([one(every) - one.constant for one in sums])
    found = minimize(sums, weights)
    assert found.shape == (5, len(sizes))
    reached = np.array([weights[b] @ [one(found[b : b + 1])[0] - one.constant for one in sums] for b in range(5)])
    np.testing.assert_allclose(reached, values.min(1), rtol=0, atol=1e-9)


def test_a_sum_is_the_sum_of_its_terms():
    model = PairwiseSum((np.array([1.0, 2.0]), np.array([10.0, 20.0, 30.0])), {(0, 1): np.arange(6.0).reshape(2, 3)}, 100.0)
    assert model.sizes == (2, 3)
    np.testing.assert_array_equal(model(np.array([[0, 0], [1, 2]])), [111.0, 100 + 2 + 30 + 5])


def test_every_assignment_is_looked_up_in_its_own_sum():
    plain = PairwiseSum((np.array([1.0, 2.0]), np.array([10.0, 20.0])), {}, 100.0)
    rows = np.array([[0, 0], [1, 1], [1, 0]])
    np.testing.assert_array_equal(each_in([plain, plain.scaled(2.0)], rows, np.array([1, 0, 1])), [222.0, 122.0, 224.0])
    assert each_in([plain], rows[:0], np.zeros(0, np.int64)).shape == (0,)


def test_batches_do_not_change_the_result(monkeypatch):
    rng = np.random.default_rng(3)
    sums, weights = [random_sum(rng, [3] * 8, 0.4)], rng.random((20, 1)) + 0.1
    whole = minimize(sums, weights)
    monkeypatch.setattr(pairwise, "MAX_BATCH", 1)
    np.testing.assert_array_equal(minimize(sums, weights), whole)


def test_pairs_of_little_effect_are_left_out_where_the_table_would_be_too_large(monkeypatch):
    rng = np.random.default_rng(0)
    weak = {pair: 1e-6 * rng.normal(size=(2, 2)) for pair in itertools.combinations(range(8), 2)}
    strong = {(i, i + 1): 10 * rng.normal(size=(2, 2)) for i in range(7)}
    unary = tuple(rng.normal(size=2) for _ in range(8))
    monkeypatch.setattr(pairwise, "MAX_TABLE", 8)
    found = minimize([PairwiseSum(unary, weak | strong)], np.ones((1, 1)))
    np.testing.assert_array_equal(found, minimize([PairwiseSum(unary, strong)], np.ones((1, 1))))


def test_a_long_chain_with_residual_partners_is_solved():
    """Sixty layers of four precisions: 10 ** 36 configurations, tables of 64 entries."""
    rng = np.random.default_rng(1)
    pairs = {(i, i + 1): rng.normal(size=(4, 4)) for i in range(59)} | {
        (i, i + 3): rng.normal(size=(4, 4)) for i in range(0, 57, 3)
    }
    model = PairwiseSum(tuple(rng.normal(size=4) for _ in range(60)), pairs)
    best = minimize([model], np.ones((1, 1)))
    # No change of one layer, or of two adjacent ones, is better.
    for i in range(59):
        for values in itertools.product(range(4), repeat=2):
            other = best.copy()
            other[0, i : i + 2] = values
            assert model(other)[0] >= model(best)[0] - 1e-9
