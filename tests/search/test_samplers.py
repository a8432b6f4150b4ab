"""Samplers by name."""

from __future__ import annotations

import optuna
import pytest
from analytic import make_graph

from qsearch.errors import UsageError
from qsearch.search.bound_space import bind_space
from qsearch.search.samplers import SAMPLERS, make_sampler
from qsearch.search.space import SearchSpace, load_space

BOUND = bind_space(load_space("default"), make_graph())


def proposals(name: str, seed: int, trials: int) -> list[dict]:
    """Parameters of a few trials of a fresh study."""
    study = optuna.create_study(directions=["minimize"] * 3, sampler=make_sampler(name, seed, trials))
    result = []
    for index in range(14):
        trial = study.ask(BOUND.distributions())
        study.tell(trial, [float(index), float(-index), float(index % 3)])
        result.append(dict(trial.params))
    return result


@pytest.mark.parametrize("name", ["random", "tpe", "nsgaii", "nsgaiii"])
def test_samplers_repeat_with_their_seed_and_move_on_when_a_study_continues(name: str) -> None:
    assert proposals(name, 0, 0) == proposals(name, 0, 0)
    assert proposals(name, 0, 0) != proposals(name, 1, 0)
    assert proposals(name, 0, 0) != proposals(name, 0, 14)


def test_gp_proposes_jointly() -> None:
    sampler = make_sampler("gp", 0, 0)
    study = optuna.create_study(directions=["minimize"] * 3, sampler=sampler)
    space = bind_space(SearchSpace.model_validate({"version": 1, "calibration": {"modes": ["max"]}}), make_graph(3))
    # Ten random trials come before its first own proposal.
    for index in range(11):
        trial = study.ask(space.distributions())
        study.tell(trial, [float(index), float(-index), float(index % 3)])
    assert set(trial.params) == set(space.distributions())


def test_names() -> None:
    assert {"random", "tpe", "nsgaii", "nsgaiii", "gp"} <= set(SAMPLERS)
    with pytest.raises(UsageError, match="random, tpe"):
        make_sampler("cmaes", 0, 0)
    with pytest.raises(UsageError, match="--seed"):
        make_sampler("tpe", -1, 0)
