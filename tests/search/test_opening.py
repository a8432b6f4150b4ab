"""What a planned study begins with."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import moocore
import numpy as np
import pytest
from analytic import AnalyticEvaluator
from networks import network

from qsearch.config import QuantConfig
from qsearch.errors import BuildError
from qsearch.measure.measurement import Accuracy, Latency, Measurement, Memory
from qsearch.search.anchors import Anchor, plain_assignments, weight_count
from qsearch.search.bound_space import bind_space
from qsearch.search.constraints import Constraints
from qsearch.search.opening import (
    NARROW,
    OF_EACH,
    choose_opening,
    mixed_anchors,
    opening_setting,
    plain_anchors,
    uniform_anchors,
)
from qsearch.search.space import SearchSpace, load_space
from qsearch.search.tables.cost import Cost
from qsearch.search.wanted import float_scale

GRAPH = network("convnext")[0].graph
PRECISIONS = ("fp32", "int16", "int8", "w4a8")
SPACE = bind_space(
    SearchSpace.model_validate(
        {"version": 1, "precisions": {"default": list(PRECISIONS)}, "calibration": {"modes": ["max", "mse"]}}
    ),
    GRAPH,
)
KINDS = [GRAPH.layer_types[one.name] for one in SPACE.layers]
# Depthwise layers are slowest in integers, and all weigh alike.
MS = {"fp32": 4.0, "int16": 2.0, "int8": 1.0, "w4a8": 1.5}
HELD = {"fp32": 400, "int16": 200, "int8": 100, "w4a8": 50}


def cost(config: QuantConfig) -> Cost:
    """A sum over the layers."""
    found = list(zip(KINDS, config.precision.values(), strict=True))
    ms = sum(0.5 + 0.5 * (name != "fp32") if kind == "depthwise" else MS[name] for kind, name in found)
    return Cost(ms, sum(HELD[name] for _, name in found))


FLOAT = cost(QuantConfig(precision={one.name: "fp32" for one in SPACE.layers}))
BASELINE = Measurement(
    Latency(FLOAT.latency_ms, 0.0, 21, 1), Memory(FLOAT.peak_bytes, 0, 0), Accuracy(80.0, 95.0, 0.0, (-0.5, 0.5), 400, "", 0.0)
)


def point(config: QuantConfig) -> np.ndarray:
    """Objectives without a loss, in shares of float's."""
    found = cost(config)
    return np.array([[found.latency_ms, found.peak_bytes, 0.0]]) / float_scale(BASELINE)


def volume(points: np.ndarray) -> float:
    """Up to the float module."""
    return float(moocore.hypervolume(points, ref=np.ones(3)))


def of_kinds(names: Mapping[str, str]) -> QuantConfig:
    """One precision for all layers of a kind."""
    layers = {one.name: names[kind] for one, kind in zip(SPACE.layers, KINDS, strict=True)}
    return SPACE.config({**opening_setting(SPACE), **layers})


def configs(anchors: list[Anchor]) -> list[QuantConfig]:
    """What they mean."""
    return [SPACE.config(one.values) for one in anchors]


def lowest(config: QuantConfig) -> str:
    """The precision of fewest bits."""
    return max(config.precision.values(), key=PRECISIONS.index)


def test_for_every_lowest_precision_it_is_what_would_add_most_if_it_lost_nothing() -> None:
    assert set(KINDS) == {"conv", "depthwise", "dense"}
    names = [dict(zip(sorted(set(KINDS)), some, strict=True)) for some in itertools.product(PRECISIONS, repeat=3)]
    rows = [[one.values.index(some[kind]) for one, kind in zip(SPACE.layers, KINDS, strict=True)] for some in names]
    assert sorted(rows) == plain_assignments(SPACE).tolist()
    every, opening = [of_kinds(some) for some in names], configs(choose_opening(SPACE, cost, BASELINE))
    chosen = [one for one in opening if one in every]
    mixed, mixtures = [one for one in opening if one not in every], configs(mixed_anchors(SPACE))
    assert all(one in mixtures for one in mixed) and len(mixed) == OF_EACH
    assert volume(point(mixed[0])) == pytest.approx(max(volume(point(one)) for one in mixtures))
    # With the uniform networks, each precision once before any comes twice; float adds nothing.
    uniform = configs(uniform_anchors(SPACE))
    assert not any(one in uniform for one in chosen)
    assert sorted(map(lowest, chosen)) == sorted(PRECISIONS[1:]), "the second of each"
    for precision in PRECISIONS[1:]:
        both = [one for one in uniform + chosen if lowest(one) == precision]
        assert len(both) == OF_EACH
        # Every combination, by brute force.
        measured = point(both[0])
        most = max(volume(np.vstack([measured, point(one)])) for one in every if lowest(one) == precision)
        assert volume(np.vstack([measured, point(both[1])])) == pytest.approx(most)
    beside = {lowest(one): point(one) for one in uniform}
    gains = [volume(np.vstack([beside[lowest(one)], point(one)])) - volume(beside[lowest(one)]) for one in chosen]
    assert gains == sorted(gains, reverse=True), "what adds most comes first"


def test_uniform_networks_come_first_and_need_no_costs() -> None:
    found = configs(uniform_anchors(SPACE))
    assert found == [of_kinds(dict.fromkeys(KINDS, precision)) for precision in ("int8", "w4a8", "int16")]
    # A layer that may not have a precision has its last one; float is what everything is compared with.
    first, second, *_ = (one.name for one in SPACE.layers)
    precisions = {"default": ["fp32", "int16"], "layers": {first: ["fp32"], second: ["fp32", "int8"]}}
    space = bind_space(SearchSpace.model_validate({"version": 1, "precisions": precisions}), GRAPH)
    rows = [[space.config(one.values).precision[layer.name] for layer in space.layers] for one in uniform_anchors(space)]
    kept = [{first: "fp32", second: "int8"}.get(layer.name, "int16") for layer in space.layers]
    assert kept in rows and not any(set(row) == {"fp32"} for row in rows)
    none = bind_space(SearchSpace.model_validate({"version": 1, "precisions": {"default": ["fp32"]}}), GRAPH)
    assert uniform_anchors(none) == []


def test_in_mixtures_weights_are_narrow_where_most_of_them_are() -> None:
    weights = {one.name: weight_count(GRAPH, GRAPH.by_name[one.name]) for one in SPACE.layers}
    plain, found = configs(plain_anchors(SPACE)), configs(mixed_anchors(SPACE))
    assert found and len({one.content_hash() for one in found + plain}) == len(found) + len(plain)
    narrow, wide = (of_kinds(dict.fromkeys(KINDS, precision)) for precision in ("w4a8", "int8"))
    # Of int8 and w4a8 alone, as much of w4a8 as there may be.
    two = [one for one in found if set(one.precision.values()) == {"int8", "w4a8"}]
    mixture = max(two, key=lambda one: list(one.precision.values()).count("w4a8"))
    held = sorted((weights[name] for name, precision in mixture.precision.items() if precision == "w4a8"), reverse=True)
    assert sum(held) >= NARROW * sum(weights.values()) > sum(held[:-1])
    assert held == sorted(weights.values(), reverse=True)[: len(held)]
    assert cost(narrow).peak_bytes < cost(mixture).peak_bytes < cost(wide).peak_bytes


def test_without_narrow_weights_there_are_no_mixtures() -> None:
    precisions = {"default": ["fp32", "int16", "int8"]}
    space = bind_space(SearchSpace.model_validate({"version": 1, "precisions": precisions}), GRAPH)
    assert mixed_anchors(space) == []


def test_what_is_beyond_a_limit_is_not_chosen() -> None:
    free = configs(choose_opening(SPACE, cost, BASELINE))
    fastest = min(cost(one).latency_ms for one in free)
    limited = configs(choose_opening(SPACE, cost, BASELINE, Constraints.against(BASELINE, {"latency_ms": 1.01 * fastest})))
    assert limited and all(cost(one).latency_ms <= 1.01 * fastest for one in limited)
    assert choose_opening(SPACE, cost, BASELINE, Constraints.against(BASELINE, {"latency_ms": 0.5 * fastest})) == []


def test_what_cannot_be_built_is_not_chosen() -> None:
    free = configs(choose_opening(SPACE, cost, BASELINE))

    def without_the_first(config: QuantConfig) -> Cost:
        if config == free[0]:
            raise BuildError("no kernel")
        return cost(config)

    chosen = configs(choose_opening(SPACE, without_the_first, BASELINE))
    assert free[0] not in chosen and len(chosen) == len(free)
    assert choose_opening(SPACE, lambda config: without_the_first(free[0]), BASELINE) == []


def test_nothing_is_chosen_that_is_as_dear_as_float() -> None:
    assert choose_opening(SPACE, lambda config: FLOAT, BASELINE) == []


def test_it_names_what_it_is_and_only_parameters_that_are_free() -> None:
    for anchor in choose_opening(SPACE, cost, BASELINE):
        assert set(anchor.values) == set(SPACE.distributions())
        plain = anchor.label.removesuffix(", but int8 for w4a8 in small layers")
        assert all(part.split()[0] in KINDS and part.split()[1] in PRECISIONS for part in plain.split(", "))
        assert anchor.values["calibration"] == "mse"


@pytest.mark.parametrize("name", ["default", "full", "hierarchical", "memory_first", "precision_preserving", "rule_driven"])
def test_the_setting_is_the_spaces_own_or_the_best_guess(name: str) -> None:
    evaluator = AnalyticEvaluator()
    space = bind_space(load_space(name), evaluator.graph)
    setting, start = opening_setting(space), space.space.start
    assert set(setting) == {one.name for one in space.settings}
    for one in ("weight_scale", "bias_correction", "granularity"):
        if (given := getattr(start, one)) is not None:
            assert setting[one] == given
    if start.calibration is None and space.space.calibration is not None and "mse" in space.space.calibration.modes:
        assert setting["calibration"] == "mse"
    for anchor in choose_opening(space, evaluator.draft(space, setting).cost, evaluator.baseline):
        assert space.config(anchor.values) == space.config({**setting, **anchor.values})
