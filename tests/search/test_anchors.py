"""The configurations a study starts with."""

from __future__ import annotations

import optuna
import pytest
from analytic import make_graph

from qsearch.search.anchors import enqueue_anchors, make_anchors, weight_count
from qsearch.search.bound_space import bind_space
from qsearch.search.space import SearchSpace, load_space

GRAPH = make_graph(20)


def test_anchors_are_deterministic_distinct_and_about_twenty() -> None:
    bound = bind_space(load_space("default"), GRAPH)
    anchors = make_anchors(bound)
    assert anchors == make_anchors(bind_space(load_space("default"), GRAPH))
    hashes = [bound.config(anchor.values).content_hash() for anchor in anchors]
    assert len(set(hashes)) == len(hashes)
    assert 15 <= len(anchors) <= 25
    assert anchors[0].label == "all fp32"
    assert set(bound.config(anchors[0].values).precision.values()) == {"fp32"}
    assert all(set(anchor.values) == set(bound.distributions()) for anchor in anchors)


@pytest.mark.parametrize("mode", ["max", "percentile", "kl_divergence", "mse"])
@pytest.mark.parametrize("granularity", ["channel_wise", "layer_wise"])
def test_every_calibration_and_granularity_is_tried_at_int8(mode: str, granularity: str) -> None:
    bound = bind_space(load_space("default"), GRAPH)
    configs = [bound.config(anchor.values) for anchor in make_anchors(bound)]
    wanted = [one for one in configs if one.calibration.mode == mode and one.granularity == granularity]
    assert any(set(one.precision.values()) == {"int8"} for one in wanted)


def test_anchors_stay_within_the_space() -> None:
    bound = bind_space(load_space("performance_optimized"), GRAPH)
    allowed = {layer.name: layer.values for layer in bound.layers}
    for anchor in make_anchors(bound):
        assert all(value in allowed[name] for name, value in bound.config(anchor.values).precision.items())


def test_every_precision_that_a_space_opens_is_tried() -> None:
    space = SearchSpace.model_validate({"version": 1, "precisions": {"default": ["w4a8", "int8", "int16", "fp32"]}})
    bound = bind_space(space, GRAPH)
    assert bound.layers[0].values == ("fp32", "int16", "int8", "w4a8")
    labels = {anchor.label.split(",")[0]: bound.config(anchor.values) for anchor in make_anchors(bound)}
    for precision in bound.layers[0].values:
        assert set(labels[f"all {precision}"].precision.values()) == {precision}


def test_a_single_configuration_is_a_single_anchor() -> None:
    assert len(make_anchors(bind_space(SearchSpace(version=1, skip=("*",)), GRAPH))) == 1


def test_anchors_are_enqueued_once() -> None:
    study = optuna.create_study(directions=["minimize"] * 3)
    bound = bind_space(load_space("default"), GRAPH)
    enqueue_anchors(study, bound)
    enqueue_anchors(study, bound)
    assert len(study.get_trials()) == len(make_anchors(bound))


def test_weight_count() -> None:
    sizes = {layer.name: weight_count(GRAPH, layer) for layer in GRAPH.layers}
    assert sizes["features.0.conv.0"] == 8 * 8 * 9
    assert sizes["features.0.conv.2"] == 8 * 9
    assert sizes["classifier"] == 10 * 8 * 14 * 14
