"""Which part of objective space a search asks for, and what a candidate is expected to add to it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import moocore
import numpy as np

__all__ = ["Wanted"]

# Of more candidates only so many are looked at closely, those that would add most if they turned out well.
SCREENED = 512
# Gauss-Hermite nodes for what is uncertain of a latency and of a loss, and how far a latency may be off, relative.
NODES, NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(3)
LATENCY_SD = 0.02
# How a candidate may turn out: latency and loss in standard deviations, and the probability.
Outcome = tuple[float, float, float]
AS_PREDICTED: tuple[Outcome, ...] = ((0.0, 0.0, 1.0),)
OUTCOMES: tuple[Outcome, ...] = tuple(
    (float(NODES[i]), float(NODES[j]), float(NODE_WEIGHTS[i] * NODE_WEIGHTS[j] / NODE_WEIGHTS.sum() ** 2))
    for i, j in itertools.product(range(len(NODES)), repeat=2)
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

    def order(self, points: np.ndarray, loss_sd: np.ndarray, front: np.ndarray) -> list[int]:
        """Positions of predicted objectives, the best merit first."""
        left = list(range(len(points)))
        if len(points) > SCREENED:
            luck = float(NODES.min())
            hopeful = points * (1.0 + luck * LATENCY_SD, 1.0, 1.0) + np.outer(loss_sd, (0.0, 0.0, luck))
            left = _best_first(self.merits(hopeful, loss_sd, front, AS_PREDICTED))
        first = left[:SCREENED]
        found = _best_first(self.merits(points[first], loss_sd[first], front))
        return [*(first[n] for n in found), *left[SCREENED:]]

    def merits(
        self, points: np.ndarray, loss_sd: np.ndarray, front: np.ndarray, outcomes: Sequence[Outcome] = OUTCOMES
    ) -> list[tuple[float, float]]:
        """What speaks for each point, to be compared as tuples.

        The hypervolume that it is expected to add to a front, and then how little it is expected to be beyond the limits. As
        long as nothing is known to be within them, the other way round.

        Args:
            points: Predicted objectives, float64 (N, 3); the first and the third are uncertain.
            loss_sd: Standard deviation of the third, float64 (N,).
            front: float64 (M, 3), within limits and reference.
            outcomes: Which of them to weigh.
        """
        before = float(moocore.hypervolume(front, ref=self.reference)) if len(front) else 0.0
        merits = []
        for point, deviation in zip(points, loss_sd, strict=True):
            gain, excess = 0.0, 0.0
            for latency_luck, loss_luck, weight in outcomes:
                latency, loss = 1.0 + LATENCY_SD * latency_luck, deviation * loss_luck
                moved = np.array([point[0] * latency, point[1], max(point[2] + loss, 0.0)])
                beyond = float(np.maximum(moved - self.limits, 0.0).sum())
                excess += weight * beyond
                if beyond == 0.0 and (moved < self.reference).all():
                    gain += weight * (float(moocore.hypervolume(np.vstack([front, moved]), ref=self.reference)) - before)
            nothing_yet = not len(front) and bool(np.isfinite(self.limits).any())
            merits.append((-round(excess, 3), gain) if nothing_yet else (gain, -excess))
        return merits


def _best_first(merits: Sequence[tuple[float, float]]) -> list[int]:
    return sorted(range(len(merits)), key=lambda n: merits[n], reverse=True)
