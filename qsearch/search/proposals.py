"""Proposals for the next trial, never one that is known already."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from qsearch.search.bound_space import BoundSpace, LogRange, Parameter

__all__ = ["unseen_values"]

# Up to here every combination is looked at before a space is called exhausted.
ENUMERABLE = 50_000
TRIES = 64


def unseen_values(
    space: BoundSpace, near: dict[str, Any], known: Collection[str], rng: np.random.Generator
) -> dict[str, Any] | None:
    """Find parameter values whose configuration is not known yet, as near to a proposal as can be.

    One parameter is drawn anew at random, then two, four and so on up to all of them.

    Args:
        space: The space.
        near: The proposal to start from: parameter name -> value.
        known: Content hashes of known configurations.
        rng: Source of randomness.

    Returns:
        Parameter values, or None if the space holds no other configuration.
    """
    parameters = space.parameters
    changes = 1
    while parameters and changes < 2 * len(parameters):
        count = min(changes, len(parameters))
        for _ in range(TRIES):
            values = dict(near)
            for index in rng.choice(len(parameters), size=count, replace=False):
                values[parameters[index].name] = _draw(parameters[index], rng)
            if space.config(values).content_hash() not in known:
                return values
        changes *= 2
    if space.size > ENUMERABLE:
        return None
    return next((values for values in space.all_values() if space.config(values).content_hash() not in known), None)


def _draw(parameter: Parameter, rng: np.random.Generator) -> Any:
    if isinstance(parameter, LogRange):
        return float(np.exp(rng.uniform(np.log(parameter.low), np.log(parameter.high))).clip(parameter.low, parameter.high))
    return parameter.values[rng.integers(len(parameter.values))]
