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


def proposals(name: str, seed: int, *runs: int) -> list[dict]:
    """Parameters of the trials of a fresh study that several processes have run, each so many trials."""
    study = optuna.create_study(directions=["minimize"] * 3)
    for count in runs:
        study.sampler = make_sampler(name, seed, len(study.trials))
        for index in range(len(study.trials), len(study.trials) + count):
            trial = study.ask(BOUND.distributions())
            study.tell(trial, [float(index), float(-index), float(index % 3)])
    return [dict(trial.params) for trial in study.trials]


@pytest.mark.parametrize("name", ["random", "tpe", "nsgaii", "nsgaiii"])
def test_samplers_repeat_with_their_seed_and_move_on_when_a_study_continues(name: str) -> None:
    found = proposals(name, 0, 14)
    assert found == proposals(name, 0, 14)
    assert found != proposals(name, 1, 14)
    continued = proposals(name, 0, 7, 7)
    assert continued[:7] == found[:7] and continued[7:] != found[:7]
    # Whichever process asks for a trial, it draws the same for it.
    if name == "random":
        assert continued == found


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
