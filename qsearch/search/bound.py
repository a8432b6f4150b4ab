"""How far a front can go by what the tables say: the front that they predict, and its hypervolume."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import moocore
import numpy as np

from qsearch.search.bound_space import BoundSpace
from qsearch.search.front import objective_hypervolume
from qsearch.search.study import OBJECTIVES
from qsearch.search.surrogate import Observation, Surrogate, fit_surrogate
from qsearch.search.tables.layer_tables import Tables
from qsearch.search.tables.pairwise import each_in, minimize
from qsearch.search.tables.settings import assignment_config, lowest

__all__ = ["TablesBound", "tables_bound"]

# Weights of latency and of bytes against divergence: so many of each, over so many factors of ten either way; fewer where
# there are so many settings that more than MOST_WEIGHTINGS in all would take minutes.
GRID, REACH, MOST_WEIGHTINGS = 13, 3.0, 2400


@dataclass(frozen=True)
class TablesBound:
    """The front that tables predict.

    Attributes:
        points: Its objectives: latency_ms, peak_bytes, top1_loss_pp; float64 (N, 3).
        hypervolume: As of a measured front, see `qsearch.search.front.hypervolume`.
        trials: Measured trials that the tables were corrected by.
    """

    points: np.ndarray
    hypervolume: float
    trials: int


def tables_bound(
    space: BoundSpace, tables: Tables, observations: Sequence[Observation], limits: Mapping[str, float]
) -> TablesBound:
    """Predict the front from the tables as the trials have corrected them.

    Its points are the exact minima of many weightings of latency, weights and divergence (Ehrgott 2005, "Multicriteria
    Optimization", section 3.1). It is no upper bound in the strict sense, for three reasons: minima of weighted sums are the
    supported points alone, and a front may have others between them; the weightings are a grid; and latency and loss are
    predictions, which measured trials miss either way, the luckiest of many trials towards the better.

    Args:
        space: The search space.
        tables: Of the same model and target.
        observations: The measured trials.
        limits: Objective -> largest value; what is predicted beyond it does not count.
    """
    settings = [one.values for one in tables.settings]
    divergences = [tables.divergence(assignment_config(space, setting, lowest(space))) for setting in settings]
    model = fit_surrogate(tables.latencies, divergences, observations, tables.storages)
    rows, chosen = _minima(model, tables)
    loss_pp = model.curve(each_in(model.divergences, rows, chosen))
    told, corrected = (each_in(one, rows, chosen) for one in (tables.latencies, model.latencies))
    points = []
    # All of them: one that another beats in latency, weights and loss may still need the smaller arena.
    for k, row in enumerate(rows):
        cost = tables.cost(assignment_config(space, settings[chosen[k]], row))
        latency_ms = corrected[k] + model.beside * (cost.latency_ms - told[k])
        points.append((float(latency_ms), float(cost.peak_bytes), float(loss_pp[k])))
    found = np.array(points, np.float64).reshape(-1, len(OBJECTIVES))
    for index, name in enumerate(OBJECTIVES):
        found = found[found[:, index] <= limits.get(name, np.inf)]
    found = found[moocore.is_nondominated(found)] if len(found) else found
    return TablesBound(found, objective_hypervolume(found, tables.baseline), len(observations))


def _minima(model: Surrogate, tables: Tables) -> tuple[np.ndarray, np.ndarray]:
    """Minima of a grid of weightings, each with the setting that gives it the least divergence.

    Returns:
        int64 (N, layers) and int64 (N,).
    """
    divergences = model.divergences
    last = np.array([[size - 1 for size in divergences[0].sizes]])
    worst = max(min(float(one(last)[0]) for one in divergences), 1e-12)
    powers = 10.0 ** np.linspace(-REACH, REACH, min(GRID, int((MOST_WEIGHTINGS / len(divergences)) ** 0.5) - 1))
    scale = (tables.baseline.latency.median_ms, float(tables.baseline.memory.peak_bytes))
    grid = [(a / scale[0], b / scale[1], 1.0 / worst) for a, b in itertools.product((0.0, *powers), repeat=2)]
    weights = np.array([*grid, (1.0 / scale[0], 0.0, 0.0), (0.0, 1.0 / scale[1], 0.0)])
    rows = [minimize(sums, weights) for sums in zip(model.latencies, tables.weights, divergences, strict=True)]
    unique = np.unique(np.concatenate(rows), axis=0)
    return unique, np.stack([one(unique) for one in divergences]).argmin(0)
