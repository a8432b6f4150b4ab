"""Samplers by name. Every one of them sees every layer in every trial."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from qsearch.errors import UsageError

__all__ = ["PLANNER", "SAMPLERS", "check_sampler", "derived_seed", "make_sampler"]

# Not made here: it needs tables, see `qsearch.search.planner`.
PLANNER = "planner"
# Half of Optuna's default: a budget of 200 trials should see several generations, not four.
POPULATION = 25


def _random(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


def _tpe(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=False)


def _nsgaii(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=POPULATION)


def _nsgaiii(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.NSGAIIISampler(seed=seed, population_size=POPULATION)


def _gp(seed: int) -> optuna.samplers.BaseSampler:
    # Its dependencies take seconds to import; Optuna loads them on the first proposal.
    return optuna.samplers.GPSampler(seed=seed)


SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "random": _random,
    "tpe": _tpe,
    "nsgaii": _nsgaii,
    "nsgaiii": _nsgaiii,
    "gp": _gp,
}


# What a Gaussian process was fitted to before is where the next fit starts from.
_REMEMBERING = ("gp",)


def check_sampler(name: str, seed: int) -> None:
    """Refuse a sampler that does not exist, or a seed that is no seed.

    Raises:
        UsageError: There is no such sampler, or the seed is negative.
    """
    if name not in (*SAMPLERS, PLANNER):
        raise UsageError(f"no sampler {name!r}; there are: {', '.join((*SAMPLERS, PLANNER))}")
    if seed < 0:
        raise UsageError(f"--seed must be 0 or more, got {seed}")


def derived_seed(seed: int, *of: int) -> int:
    """A seed of its own for every number of trials, process and so on: none may draw what another has drawn."""
    return int(np.random.SeedSequence([seed, *of]).generate_state(1)[0])


class NumberedSampler(optuna.samplers.BaseSampler):
    """Draws each trial's values from a seed of its own, so that it does not matter which process asks for which trial.

    A random search explores the same configurations whether one process runs it or several do; the other samplers see
    different histories, but never draw the same numbers twice.

    Args:
        make: Seed -> a sampler that keeps nothing from trial to trial but in the study.
        seed: The user's.
    """

    def __init__(self, make: Callable[[int], optuna.samplers.BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed
        self._sampler = make(seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Begin a trial."""
        self._sampler = self._make(derived_seed(self._seed, trial.number))
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """As of the sampler."""
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As of the sampler."""
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As of the sampler."""
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """End a trial."""
        self._sampler.after_trial(study, trial, state, values)


def make_sampler(name: str, seed: int, *trials: int) -> optuna.samplers.BaseSampler:
    """Make a sampler.

    Args:
        name: One of SAMPLERS.
        seed: The user's seed.
        trials: Trials the study has already, and whatever else tells this process from others that work on it.
    """
    check_sampler(name, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name in _REMEMBERING:
            return SAMPLERS[name](derived_seed(seed, *trials))
        return NumberedSampler(SAMPLERS[name], seed)
