"""Roundings that images decide, from a configuration to its program."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import images, network
from scipy.special import log_softmax

from qsearch.calibrate.observe import observe
from qsearch.calibrate.ranges import activation_ranges
from qsearch.config import QuantConfig, WeightSettings
from qsearch.errors import QuantizeError
from qsearch.models.graph import Model
from qsearch.models.interpret import call_foreign, interpret
from qsearch.qtype import W4A8
from qsearch.quantize.lower import lower
from qsearch.quantize.program import Program
from qsearch.quantize.reference import run_program
from qsearch.quantize.rounding.learned_config import learned_layers
from qsearch.quantize.rounding.rounded_weights import RoundedWeights
from qsearch.quantize.variants import Variants
from qsearch.quantize.weight_store import WeightStore

MODEL = network("residual")[0]
DATA = images(40, 1)
INNER = {"default_precision": "w4a8", "rules": [{"position": [0, -1], "precision": "int8"}], "bias_correction": "measured"}


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Variants:
    folder = tmp_path_factory.mktemp("roundings")
    return Variants(MODEL, lambda model: observe(model, DATA, 8), lambda model: RoundedWeights(model, lambda: DATA, "d", folder))


def program(variants: Variants, **settings: object) -> Program:
    config = QuantConfig.model_validate({**INNER, **settings})
    variant = variants(config)
    ranges = activation_ranges(variant.record, variant.model, config.calibration, (-6.0, 6.0))
    learned = learned_layers(variant.model, config, ranges, variant.weights, variant.means("measured"))
    return lower(variant.model, config, ranges, variant.weights, variant.means(config.bias_correction), learned)


def divergence(of: Program, model: Model, data: np.ndarray) -> float:
    """Mean KL divergence of a program's outputs from the float network's."""
    plain = log_softmax(interpret(model, torch.from_numpy(data)).double().numpy(), 1)
    rows = [run_program(of, row[None], call_foreign)[of.output.name][0] for row in data]  # type: ignore[arg-type]
    return float((np.exp(plain) * (plain - log_softmax(np.array(rows, np.float64), 1))).sum(1).mean())


def test_better_roundings_move_the_outputs_less(variants: Variants) -> None:
    fresh = images(24, 9)
    nearest = divergence(program(variants), MODEL, fresh)
    second = divergence(program(variants, rounding="second_order"), MODEL, fresh)
    learned = divergence(program(variants, rounding="learned"), MODEL, fresh)
    grouped = divergence(
        program(variants, rounding="second_order", granularity="group_wise", weight_symmetry="asymmetric"), MODEL, fresh
    )
    by_layer = divergence(program(variants, rounding="learned_layer"), MODEL, fresh)
    assert second < nearest
    assert learned < nearest
    assert by_layer < nearest and by_layer != learned
    assert grouped < nearest


def test_learned_rounding_of_groups_is_refused(variants: Variants) -> None:
    with pytest.raises(QuantizeError, match="neither groups nor asymmetric"):
        program(variants, rounding="learned", granularity="group_wise")


def test_one_image_is_enough_for_second_order_and_learning_says_how_many_it_wants(tmp_path: Path) -> None:
    one = DATA[:1]
    of = Variants(MODEL, lambda model: observe(model, one, 8), lambda model: RoundedWeights(model, lambda: one, "1", tmp_path))
    assert np.isfinite(divergence(program(of, rounding="second_order"), MODEL, DATA[1:3]))
    with pytest.raises(QuantizeError, match="at least 5 calibration images, got 1: give it more"):
        program(of, rounding="learned_layer")


def test_without_images_nothing_is_rounded_by_them() -> None:
    config = QuantConfig.model_validate({**INNER, "rounding": "second_order", "bias_correction": "none"})
    record = observe(MODEL, DATA, 8)
    ranges = activation_ranges(record, MODEL, config.calibration, (-6.0, 6.0))
    with pytest.raises(QuantizeError, match="needs calibration images"):
        lower(MODEL, config, ranges, WeightStore())


def test_what_was_learned_is_found_again(variants: Variants, tmp_path: Path) -> None:
    asked: list[str] = []

    def given() -> np.ndarray:
        asked.append("images")
        return DATA

    outputs, counts = [], []
    for _ in range(2):
        again = Variants(MODEL, lambda model: observe(model, DATA, 8), lambda model: RoundedWeights(model, given, "d", tmp_path))
        of = program(again, rounding="learned")
        outputs.append(run_program(of, DATA[:1], call_foreign)[of.output.name])  # type: ignore[arg-type]
        counts.append(len(asked))
    # What rounding to 8 and to 4 bits needs, and learning, the first time only.
    assert counts == [2, 2]
    np.testing.assert_array_equal(*outputs)


def test_a_channel_whose_bias_needs_a_larger_scale_leaves_the_others_as_they_were_rounded(tmp_path: Path) -> None:
    parameters = MODEL.parameters
    layer = next(node.name for node in MODEL.graph.layers if node.op == "conv2d" and node.conv.kernel == (1, 1))
    weight, bias = parameters.weight[layer].copy(), parameters.bias[layer].copy()
    weight[1] *= 1e-9
    bias[1] = 5.0
    model = Model(
        "dead",
        MODEL.graph,
        replace(parameters, weight={**parameters.weight, layer: weight}, bias={**parameters.bias, layer: bias}),
    )
    of = Variants(model, lambda given: observe(given, DATA, 8), lambda given: RoundedWeights(given, lambda: DATA, "d", tmp_path))
    made = program(of, rounding="second_order")
    (op,) = (op for op in made.ops if op.name == layer)
    settings = WeightSettings(rounding="second_order")
    kept = of.plain.weights.quantized(layer, weight, settings, W4A8.weight)
    others = np.arange(len(weight)) != 1
    np.testing.assert_array_equal(op.constants["weight"][others], kept.values[others])
    assert not op.constants["weight"][1].any()
