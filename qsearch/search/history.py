"""How a study's front grew, trial by trial."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import moocore
import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from qsearch.measure.measurement import Measurement
from qsearch.search.constraints import is_feasible
from qsearch.search.front import objective_hypervolume

__all__ = ["FrontStep", "hypervolume_history"]

Fate = Literal["measured", "infeasible", "stopped early", "failed"]


@dataclass(frozen=True)
class FrontStep:
    """A trial, and how far the front had come with it.

    Attributes:
        trial: Its number.
        fate: What became of it.
        hypervolume: Of the front as the search saw it, this trial included.
    """

    trial: int
    fate: Fate
    hypervolume: float


def hypervolume_history(study: optuna.Study, baseline: Measurement) -> list[FrontStep]:
    """The hypervolume after each trial that was measured, stopped early or failed, in the order of their numbers.

    Only what the search itself measured counts: points that a second measurement dropped are in it.

    Args:
        study: The study.
        baseline: Its float module.
    """
    front, volume = np.empty((0, 3)), 0.0
    found: list[FrontStep] = []
    for trial in study.get_trials(deepcopy=False):
        fate = _fate(trial)
        if fate is None:
            continue
        if fate == "measured":
            front = np.concatenate([front, np.array([trial.values], np.float64)])
            front = front[moocore.is_nondominated(front)]
            volume = objective_hypervolume(front.copy(), baseline)
        found.append(FrontStep(trial.number, fate, volume))
    return found


def _fate(trial: FrozenTrial) -> Fate | None:
    """What became of a trial; None for one that runs, waits, or repeated another."""
    if trial.state == TrialState.FAIL:
        return "failed"
    if trial.state == TrialState.PRUNED:
        return "stopped early" if "bound" in trial.user_attrs else None
    if trial.state != TrialState.COMPLETE or "measurement" not in trial.user_attrs:
        return None
    return "measured" if is_feasible(trial) else "infeasible"
