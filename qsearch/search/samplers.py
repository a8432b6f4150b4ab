"""Samplers by name. Every one of them sees every layer in every trial."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import optuna

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


def check_sampler(name: str, seed: int) -> None:
    """Refuse a sampler that does not exist, or a seed that is no seed.

    Raises:
        UsageError: There is no such sampler, or the seed is negative.
    """
    if name not in (*SAMPLERS, PLANNER):
        raise UsageError(f"no sampler {name!r}; there are: {', '.join((*SAMPLERS, PLANNER))}")
    if seed < 0:
        raise UsageError(f"--seed must be 0 or more, got {seed}")


def derived_seed(seed: int, trials: int) -> int:
    """A seed of its own for every number of trials: a continued study must not draw the same numbers again."""
    return int(np.random.SeedSequence([seed, trials]).generate_state(1)[0])


def make_sampler(name: str, seed: int, trials: int) -> optuna.samplers.BaseSampler:
    """Make a sampler.

    Args:
        name: One of SAMPLERS.
        seed: The user's seed.
        trials: Trials the study has already.
    """
    check_sampler(name, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return SAMPLERS[name](derived_seed(seed, trials))
