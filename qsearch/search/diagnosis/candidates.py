"""What may help a configuration: each remedy changes one thing about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from qsearch.config import Calibration, LayerRule, LayerType, QuantConfig
from qsearch.qtype import PRECISIONS, UNSCALED

__all__ = ["HIGHER", "Candidate", "candidates", "together"]

CALIBRATIONS = (Calibration(mode="max"), Calibration(mode="percentile", percentile=99.99), Calibration(mode="mse"))
MIGRATION = 0.5
# What layers that cost much may be raised to, as far as a target has it.
HIGHER = ("int8", "int16", "fp16", "fp32")


@dataclass(frozen=True)
class Candidate:
    """A change of a configuration.

    Attributes:
        name: What is changed, in words.
        kind: 'granularity', 'calibration', 'weight_scale', 'activations', 'equalization', 'bias_correction', 'migration',
            'precision' or 'together'.
        change: The fields of the configuration that are set anew, as plain types: a fragment to be pasted; of `precision` only
            the layers that change.
        config: The configuration with the change.
    """

    name: str
    kind: str
    change: dict[str, Any]
    config: QuantConfig


def candidates(
    config: QuantConfig,
    layers: Mapping[str, LayerType],
    worst: Sequence[str],
    higher: Sequence[str] = ("int8", "int16", "fp32"),
) -> list[Candidate]:
    """The remedies for a configuration, those first that gain most as a rule.

    Args:
        config: The configuration.
        layers: Layer name -> type, for every layer, in graph order.
        worst: The layers that cost most, most first; they are given higher precisions.
        higher: Which precisions to give them.
    """
    settings = config.resolve(layers)
    integer = [one for one in settings.values() if one.precision not in UNSCALED]
    found = []
    if any(one.weights.granularity == "layer_wise" for one in integer):
        found.append(_everywhere(config, "granularity", "channel_wise", "granularity channel_wise"))
    if not config.equalization:
        found.append(_changed(config, "equalization", True, "cross-layer equalization"))
    if config.bias_correction == "none":
        found.append(_changed(config, "bias_correction", "measured", "bias correction"))
    found += _higher(config, {name: settings[name].precision for name in worst}, higher)
    for calibration in CALIBRATIONS:
        if any(one.calibration != calibration for one in integer):
            mode = calibration.mode + (f" {calibration.percentile:g}" if calibration.mode == "percentile" else "")
            found.append(_everywhere(config, "calibration", calibration, f"calibration {mode}"))
    if any(one.weights.weight_scale != "mse" for one in integer):
        found.append(_everywhere(config, "weight_scale", "mse", "weight scale mse"))
    if config.activations == "symmetric":
        found.append(_changed(config, "activations", "asymmetric", "activations asymmetric"))
    if not config.migration:
        found.append(_changed(config, "migration", MIGRATION, f"migration {MIGRATION:g}"))
    return found


def together(config: QuantConfig, helped: Sequence[Candidate]) -> Candidate | None:
    """The first of each kind of several remedies, all at once, precisions excepted; None of fewer than two.

    Args:
        config: The configuration that they are for.
        helped: Remedies, the best first.
    """
    chosen: dict[str, Candidate] = {}
    for one in helped:
        if one.kind != "precision":
            chosen.setdefault(one.kind, one)
    if len(chosen) < 2:
        return None
    change: dict[str, Any] = {}
    for one in chosen.values():
        change |= {name: value for name, value in one.change.items() if name != "rules"}
    added = [rule for one in chosen.values() for rule in one.config.rules[len(config.rules) :]]
    rules = (*config.rules, *added)
    if added:
        change["rules"] = [_plain(rule) for rule in rules]
    values = {name: getattr(one.config, name) for one in chosen.values() for name in one.change if name != "rules"}
    name = ", ".join(one.name for one in chosen.values())
    return Candidate(f"together: {name}", "together", change, config.model_copy(update=values | {"rules": rules}))


def _higher(config: QuantConfig, worst: Mapping[str, str], higher: Sequence[str]) -> Iterator[Candidate]:
    """The layers that cost most at every one of some precisions that is above their own, the lowest first."""
    order = list(PRECISIONS)
    for target in sorted(higher, key=order.index, reverse=True):
        raised = [name for name, own in worst.items() if order.index(own) > order.index(target)]
        if raised:
            precision = {**config.precision, **dict.fromkeys(raised, target)}
            changed = config.model_copy(update={"precision": precision})
            change = {"precision": dict.fromkeys(raised, target)}
            yield Candidate(f"{target} in {', '.join(raised)}", "precision", change, changed)


def _changed(config: QuantConfig, field: str, value: Any, name: str) -> Candidate:
    return Candidate(name, field, {field: _plain(value)}, config.model_copy(update={field: value}))


def _everywhere(config: QuantConfig, field: str, value: Any, name: str) -> Candidate:
    """Set a field for all layers, also those that a rule has set it for."""
    if all(getattr(rule, field) is None for rule in config.rules):
        return _changed(config, field, value, name)
    rules = (*config.rules, LayerRule.model_validate({"layers": ("*",), field: value}))
    return Candidate(name, field, {"rules": [_plain(rule) for rule in rules]}, config.model_copy(update={"rules": rules}))


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json", exclude_unset=True) if isinstance(value, BaseModel) else value
