"""Which part of objective space a search asks for, and what a candidate is expected to add to it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import moocore
import numpy as np

from qsearch.measure.measurement import Measurement
from qsearch.search.study import LOSS_BOUND_PP, OBJECTIVES

__all__ = ["Wanted", "added_hypervolume", "float_scale"]

# How far beyond a limit the corner of the hypervolume is, so that points at the limit count; a share of the scale.
LIMIT_MARGIN = 0.02

# Of more candidates only so many are looked at closely, those that would add most if they turned out well.
SCREENED = 512
# Gauss-Hermite nodes for what is uncertain of a latency and of a loss, and how far a latency may be off, relative.
NODES, NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(3)
LATENCY_SD = 0.02
# How a candidate may turn out: latency and loss in standard deviations, and the probability.
AS_PREDICTED = np.array([[0.0, 0.0, 1.0]])
OUTCOMES = np.array(
    [
        (NODES[i], NODES[j], NODE_WEIGHTS[i] * NODE_WEIGHTS[j] / NODE_WEIGHTS.sum() ** 2)
        for i, j in itertools.product(range(len(NODES)), repeat=2)
    ]
)


@dataclass(frozen=True)
class Wanted:
    """Which part of objective space is asked for; all objectives in shares of float's, and of LOSS_BOUND_PP.

    Attributes:
        limits: The constraints, float64 (3,); infinite where there is none.
        reference: The corner that hypervolume is counted from, float64 (3,).
    """

    limits: np.ndarray
    reference: np.ndarray

    @classmethod
    def within(cls, limits: Mapping[str, float], scale: np.ndarray) -> Wanted:
        """The part within limits, objective -> largest value; scale as of `float_scale`."""
        shares = np.array([limits.get(name, np.inf) for name in OBJECTIVES]) / scale
        return cls(shares, np.minimum(shares + LIMIT_MARGIN, 1.0))

    def order(self, points: np.ndarray, loss_sd: np.ndarray, front: np.ndarray) -> list[int]:
        """Positions of predicted objectives, the best merit first."""
        left = np.arange(len(points))
        if len(points) > SCREENED:
            luck = float(NODES.min())
            hopeful = points * (1.0 + luck * LATENCY_SD, 1.0, 1.0) + np.outer(loss_sd, (0.0, 0.0, luck))
            left = _best_first(self.merits(hopeful, loss_sd, front, AS_PREDICTED))
        first = left[:SCREENED]
        found = first[_best_first(self.merits(points[first], loss_sd[first], front))]
        return np.concatenate([found, left[SCREENED:]]).tolist()

    def merits(self, points: np.ndarray, loss_sd: np.ndarray, front: np.ndarray, outcomes: np.ndarray = OUTCOMES) -> np.ndarray:
        """What speaks for each point, float64 (N, 2): the second counts between those that are alike in the first.

        The hypervolume that it is expected to add to a front, and then how little it is expected to be beyond the limits. As
        long as nothing is known to be within them, the other way round.

        Args:
            points: Predicted objectives, float64 (N, 3); the first and the third are uncertain.
            loss_sd: Standard deviation of the third, float64 (N,).
            front: float64 (M, 3), within limits and reference.
            outcomes: Which of them to weigh, float64 (K, 3).
        """
        latency_luck, loss_luck, weights = outcomes.T
        moved = np.repeat(points[:, None], len(outcomes), axis=1)
        moved[..., 0] *= 1.0 + LATENCY_SD * latency_luck
        moved[..., 2] = np.maximum(moved[..., 2] + loss_sd[:, None] * loss_luck, 0.0)
        beyond = np.maximum(moved - self.limits, 0.0).sum(2)
        gains = added_hypervolume(front, moved.reshape(-1, 3), self.reference).reshape(beyond.shape)
        gain, excess = np.where(beyond == 0.0, gains, 0.0) @ weights, beyond @ weights
        nothing_yet = not len(front) and bool(np.isfinite(self.limits).any())
        return np.stack([-excess.round(3), gain] if nothing_yet else [gain, -excess], 1)


def float_scale(baseline: Measurement) -> np.ndarray:
    """What objectives are divided by: the float module's latency and bytes, and LOSS_BOUND_PP, float64 (3,)."""
    return np.array([baseline.latency.median_ms, float(baseline.memory.peak_bytes), LOSS_BOUND_PP])


def added_hypervolume(front: np.ndarray, points: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The hypervolume that each point by itself adds to a front.

    Swept along the third objective (Fonseca, Paquete and Lopez-Ibanez 2006, "An improved dimension-sweep algorithm for the
    hypervolume indicator"): between two of its values in the front what is not dominated is the area beyond a staircase.

    Args:
        front: float64 (M, 3).
        points: float64 (N, 3).
        reference: The corner that hypervolume is counted from, float64 (3,).

    Returns:
        float64 (N,).
    """
    front = front[moocore.is_nondominated(front)] if len(front) else front
    levels = np.unique(front[:, 2])
    added = np.zeros(len(points))
    for start, end in itertools.pairwise([-np.inf, *levels, reference[2]]):
        depth = np.maximum(end - np.maximum(points[:, 2], start), 0.0)
        here = depth > 0.0
        added[here] += depth[here] * _area_beyond(front[front[:, 2] <= start, :2], points[here, :2], reference[:2])
    return added


def _area_beyond(steps: np.ndarray, points: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The area between each point, float64 (N, 2), and the corner that no step, float64 (M, 2), dominates."""
    x, y = points.T
    steps = steps[np.argsort(steps[:, 0])]
    # Left of all steps it reaches up to the corner, beyond each of them to the lowest so far.
    low = min(x.min(initial=np.inf), steps[:, 0].min(initial=np.inf), reference[0])
    edges = np.concatenate([[low], steps[:, 0], reference[:1]])
    heights = np.concatenate([reference[1:], np.minimum.accumulate(steps[:, 1])])
    integral = np.concatenate([[0.0], np.cumsum(heights * np.diff(edges))])
    # Where the staircase comes down to the point.
    end = edges[np.searchsorted(-heights, -y)]
    area = np.interp(end, edges, integral) - np.interp(x, edges, integral) - y * (end - x)
    return np.where(end > x, np.maximum(area, 0.0), 0.0)


def _best_first(merits: np.ndarray) -> np.ndarray:
    return np.lexsort((-merits[:, 1], -merits[:, 0]))
