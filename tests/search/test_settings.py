"""Which settings of a space are measured, and which of them the planner tells apart."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from analytic import make_graph

from qsearch.search.bound_space import BoundSpace, bind_space
from qsearch.search.space import load_space
from qsearch.search.tables.cost_fit import pairs_around
from qsearch.search.tables.sensitivity_table import Sensitivity, integer_pairs
from qsearch.search.tables.settings import (
    MOST_SETTINGS,
    TableKey,
    assignment_config,
    chosen_settings,
    lowest,
    measured_settings,
    storage,
    table_key,
    table_settings,
)

IMAGES = 8


def drawn_tables(space: BoundSpace) -> dict[TableKey, Sensitivity]:
    """Sensitivities of random sizes in all that is measured."""
    layers = {one.name: one.values for one in space.layers}
    keys: dict[TableKey, tuple[dict[str, None], dict[str, None]]] = {}
    for setting in measured_settings(space):
        config = assignment_config(space, setting, lowest(space))
        ranges, weights = keys.setdefault(table_key(config), ({}, {}))
        ranges[config.ranges_key()] = weights[config.weights_key()] = None
    rng, pairs = np.random.default_rng(0), len(integer_pairs(layers))

    def moved(count: int) -> np.ndarray:
        return (rng.lognormal(0, 1, (count, 1, 1)) * rng.normal(size=(count, pairs, IMAGES))).astype(np.float32)

    return {
        key: Sensitivity(layers, tuple(ranges), tuple(weights), moved(len(ranges)), moved(len(weights)))
        for key, (ranges, weights) in keys.items()
    }


@pytest.fixture(scope="module")
def full() -> BoundSpace:
    return bind_space(load_space("full"), make_graph())


def test_a_space_of_few_settings_is_measured_in_all_of_them() -> None:
    space = bind_space(load_space("default"), make_graph())
    assert measured_settings(space) == table_settings(space) == chosen_settings(space, {})


def test_totals_are_sums_of_divergences_and_couplings(full: BoundSpace) -> None:
    table = drawn_tables(full)[False, False]
    first, second = (layer.name for layer in full.layers[:2])
    totals = table.totals([(layer.name, "w4a8") for layer in full.layers], [(0, 1)])
    for setting in measured_settings(full)[:20:3]:
        config = assignment_config(full, setting, lowest(full))
        if table_key(config) != (False, False):
            continue
        place = table.range_keys.index(config.ranges_key()), table.weight_keys.index(config.weights_key())
        coupling = float(table.coupling((first, second), config)[-1, -1])
        assert totals[place] == pytest.approx(sum(one[-1] for one in table.divergence(config).values()) + coupling, rel=1e-5)


def test_of_a_wide_space_those_are_told_apart_that_promise_the_least(full: BoundSpace) -> None:
    tables = drawn_tables(full)
    chosen = chosen_settings(full, tables)
    configs = [assignment_config(full, one, lowest(full)) for one in chosen]
    assert len({config.content_hash() for config in configs}) == len(chosen) == MOST_SETTINGS
    assert chosen[0] == table_settings(full)[0], "the plainest is the first"
    for config in configs:
        tables[table_key(config)].divergence(config)
    held = {tuple(dict(storage(one))[name] for name in ("granularity", "weight_symmetry")) for one in chosen}
    assert held >= set(itertools.product(("channel_wise", "group_wise"), ("symmetric", "asymmetric")))
    # The best of all combinations is among them, measured together or not.
    pairs = [(layer.name, "w4a8") for layer in full.layers]
    totals = {key: table.totals(pairs, pairs_around(full.graph, [layer for layer, _ in pairs])) for key, table in tables.items()}
    found = []
    for config in configs:
        table = tables[table_key(config)]
        place = table.range_keys.index(config.ranges_key()), table.weight_keys.index(config.weights_key())
        found.append(totals[table_key(config)][place])
    assert min(found) == min(one.min() for one in totals.values())
    assert np.median(found) < np.median(np.concatenate([one.ravel() for one in totals.values()]))
