"""What a candidate adds to a front."""

import moocore
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qsearch.search.wanted import added_hypervolume

# Coarse, so that points share coordinates with each other and with the corner.
COORDINATE = st.one_of(st.integers(0, 5).map(lambda n: n / 4), st.floats(0.0, 1.25, width=32))
POINTS = st.lists(st.tuples(COORDINATE, COORDINATE, COORDINATE), max_size=12)


@given(POINTS, POINTS, st.tuples(COORDINATE, COORDINATE, COORDINATE))
def test_what_points_add_is_the_difference_of_two_hypervolumes(front: list, points: list, corner: tuple) -> None:
    measured, reference = np.array(front, np.float64).reshape(-1, 3), np.array(corner, np.float64)
    measured = measured[(measured < reference).all(1)]
    candidates = np.array(points, np.float64).reshape(-1, 3)

    def hypervolume(some: np.ndarray) -> float:
        within = some[(some < reference).all(1)]
        return float(moocore.hypervolume(within, ref=reference)) if len(within) else 0.0

    expected = [hypervolume(np.vstack([measured, one])) - hypervolume(measured) for one in candidates]
    found = added_hypervolume(measured, candidates, reference)
    assert found.shape == (len(candidates),) and (found >= 0.0).all()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_what_is_dominated_adds_nothing_at_all() -> None:
    front = np.random.default_rng(0).random((40, 3))
    behind = front + np.random.default_rng(1).random((40, 3)) * 0.1
    np.testing.assert_array_equal(added_hypervolume(front, behind, np.ones(3)), 0.0)
