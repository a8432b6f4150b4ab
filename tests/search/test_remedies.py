"""Which remedies there are for a configuration, and which to try first."""

from __future__ import annotations

from diagnoses import remedy

from qsearch.config import LayerType, QuantConfig
from qsearch.search.diagnosis.candidates import candidates, together
from qsearch.search.diagnosis.diagnosis import first_remedy
from qsearch.search.diagnosis.remedies import Remedies

LAYERS: dict[str, LayerType] = {"stem": "conv", "depth": "depthwise", "head": "dense"}


def named(config: QuantConfig, worst: tuple[str, ...] = ("depth", "head")) -> dict[str, dict]:
    found = candidates(config, LAYERS, worst)
    for one in found:
        # What is pasted must be what was measured.
        fields = {"precision": {**config.precision, **one.change["precision"]}} if "precision" in one.change else one.change
        assert QuantConfig.model_validate(config.to_json() | fields).content_hash() == one.config.content_hash()
    return {one.name: one.change for one in found}


def test_of_a_plain_configuration() -> None:
    assert list(named(QuantConfig())) == [
        "cross-layer equalization",
        "bias correction",
        "int16 in depth, head",
        "fp32 in depth, head",
        "calibration percentile 99.99",
        "calibration mse",
        "weight scale mse",
        "migration 0.5",
    ]


def test_only_what_a_configuration_does_not_have_yet() -> None:
    config = QuantConfig.model_validate(
        {
            "default_precision": "w4a8",
            "precision": {"head": "int16"},
            "skip": ["stem"],
            "granularity": "layer_wise",
            "weight_scale": "mse",
            "equalization": True,
            "bias_correction": "analytic",
            "migration": 0.3,
            "activations": "symmetric",
            "calibration": {"mode": "mse"},
        }
    )
    assert named(config) == {
        "granularity channel_wise": {"granularity": "channel_wise"},
        "int8 in depth": {"precision": {"depth": "int8"}},
        "int16 in depth": {"precision": {"depth": "int16"}},
        "fp32 in depth, head": {"precision": {"depth": "fp32", "head": "fp32"}},
        "calibration max": {"calibration": {"mode": "max"}},
        "calibration percentile 99.99": {"calibration": {"mode": "percentile", "percentile": 99.99}},
        "activations asymmetric": {"activations": "asymmetric"},
    }


def test_rules_do_not_stand_in_the_way() -> None:
    rule = {"types": ["conv"], "granularity": "layer_wise", "calibration": {"mode": "percentile", "percentile": 90.0}}
    config = QuantConfig.model_validate({"rules": [rule]})
    found = named(config)
    assert found["granularity channel_wise"] == {"rules": [rule, {"layers": ["*"], "granularity": "channel_wise"}]}
    for one in candidates(config, LAYERS, ()):
        settings = one.config.resolve(LAYERS)
        if one.kind == "granularity":
            assert {each.weights.granularity for each in settings.values()} == {"channel_wise"}
        if one.kind == "calibration":
            assert len({each.calibration.model_dump_json() for each in settings.values()}) == 1


def test_several_at_once_are_the_best_of_each_kind() -> None:
    rule = {"types": ["conv"], "granularity": "layer_wise"}
    config = QuantConfig.model_validate({"rules": [rule]})
    by_name = {one.name: one for one in candidates(config, LAYERS, ("head",))}
    names = ("calibration mse", "fp32 in head", "granularity channel_wise", "calibration percentile 99.99", "bias correction")
    both = together(config, [by_name[name] for name in names])
    assert both is not None and both.name == "together: calibration mse, granularity channel_wise, bias correction"
    assert both.change == {
        "calibration": {"mode": "mse"},
        "bias_correction": "measured",
        "rules": [rule, {"layers": ["*"], "granularity": "channel_wise"}],
    }
    assert QuantConfig.model_validate(config.to_json() | both.change).content_hash() == both.config.content_hash()
    assert both.config.precision == {}
    assert together(config, [by_name["calibration mse"], by_name["calibration percentile 99.99"]]) is None


def test_first_comes_what_helps_and_costs_least() -> None:
    def first(*measured) -> str | None:
        found = first_remedy(Remedies(list(measured)))
        return found and found.candidate.kind

    assert first() is first(remedy("calibration", 0.5)) is None
    precise, more = remedy("precision", 5.0, ratio=1.4, divergence=0.001), remedy("together", 4.9, divergence=0.002)
    near, far = remedy("granularity", 4.0, divergence=0.01), remedy("equalization", 4.5, divergence=0.05)
    assert first(precise) == "precision"
    assert first(precise, more) == "together"
    assert first(precise, more, far) == "equalization"
    assert first(precise, more, far, near) == "granularity"
    assert first(precise, more, far, remedy("granularity", 4.0, divergence=0.01, ratio=1.2)) == "equalization"
    assert first(precise, remedy("granularity", 2.0, not_best=True)) == "precision"
