"""Configurations: their stable form, and which settings each layer gets."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from qsearch.config import Calibration, LayerRule, QuantConfig, WeightSettings
from qsearch.errors import SpaceError

LAYERS = {"stem.conv": "conv", "block.depth": "depthwise", "block.point": "conv", "head.fc": "dense"}


def test_what_came_later_does_not_change_the_hash_of_older_configurations() -> None:
    # Of a study that was written before there were rules and methods.
    assert QuantConfig().content_hash() == "7fcbe2bbc415299716990122d1bb41a2a4b7bd5ffe37f06a3e96f513956837cd"
    assert QuantConfig(equalization=True).content_hash() != QuantConfig().content_hash()


def test_the_json_form_is_read_back() -> None:
    config = QuantConfig(
        rules=(LayerRule(types=("dense",), calibration=Calibration(mode="percentile", percentile=99.9)),),
        migration=0.5,
        bias_correction="measured",
    )
    assert QuantConfig.model_validate(config.to_json()) == config


def test_later_rules_win_and_names_win_over_rules() -> None:
    config = QuantConfig(
        rules=(
            LayerRule(types=("conv", "depthwise"), precision="int16", granularity="layer_wise"),
            LayerRule(layers=("block.*",), precision="w4a8", rounding="second_order"),
            LayerRule(position="last", precision="fp32"),
        ),
        precision={"block.depth": "int8"},
    )
    found = config.resolve(LAYERS)
    assert {name: one.precision for name, one in found.items()} == {
        "stem.conv": "int16",
        "block.depth": "int8",
        "block.point": "w4a8",
        "head.fc": "fp32",
    }
    assert found["block.point"].weights == WeightSettings("layer_wise", rounding="second_order")
    assert found["head.fc"].weights == WeightSettings()


def test_positions_count_from_both_ends() -> None:
    config = QuantConfig(rules=(LayerRule(position=(0, -2), precision="fp32"),))
    found = config.resolve(LAYERS)
    assert [name for name, one in found.items() if one.precision == "fp32"] == ["stem.conv", "block.point"]


def test_calibration_belongs_to_the_layers_of_a_rule() -> None:
    clipped = Calibration(mode="percentile", percentile=99.9)
    found = QuantConfig(rules=(LayerRule(types=("conv",), calibration=clipped),)).resolve(LAYERS)
    assert [one.calibration for one in found.values()] == [clipped, Calibration(), clipped, Calibration()]


@pytest.mark.parametrize(
    "rule, message",
    [
        ({"layers": ["blok.depth"]}, "rule 1: 'blok.depth' matches no layer; did you mean 'block.depth'"),
        ({"layers": ["block.*", "*.conv2"]}, r"rule 1: '\*.conv2' matches no layer; did you mean 'stem.conv'"),
        (
            {"types": ["dense"], "layers": ["block.*"]},
            "rule 1 matches no layer of the model, whose layers are of the types conv, d",
        ),
        ({"position": [4]}, "there is no layer 4, the model has 4"),
    ],
)
def test_a_rule_for_nothing_is_an_error_that_names_what_comes_near(rule: dict, message: str) -> None:
    config = QuantConfig.model_validate({"rules": [{**rule, "precision": "int16"}]})
    with pytest.raises(SpaceError, match=message):
        config.resolve(LAYERS)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"precision": "int8"}, {"types": ["conv"], "percentile": 99}, {"types": ["pool"]}])
def test_rules_are_checked_when_they_are_read(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        QuantConfig.model_validate({"rules": [wrong]})
