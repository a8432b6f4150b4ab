"""A quantization configuration: everything that distinguishes one trial from another."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator

from qsearch.bounded import read_file, shortened
from qsearch.errors import SpaceError

__all__ = [
    "BiasCorrection",
    "Calibration",
    "CalibrationMode",
    "Granularity",
    "LayerRule",
    "LayerSettings",
    "LayerType",
    "Position",
    "QuantConfig",
    "Rounding",
    "Symmetry",
    "WeightScale",
    "WeightSettings",
    "load_config",
    "matching_layers",
    "named_config",
    "validation_message",
]

CalibrationMode = Literal["max", "percentile", "kl_divergence", "mse", "global_scale"]
Granularity = Literal["channel_wise", "layer_wise", "group_wise"]
WeightScale = Literal["max", "power_of_two", "mse"]
Symmetry = Literal["symmetric", "asymmetric"]
Rounding = Literal["nearest", "second_order", "learned", "learned_layer"]
BiasCorrection = Literal["none", "analytic", "measured"]
LayerType = Literal["conv", "depthwise", "dense"]
Position = Literal["first", "last"] | tuple[int, ...]
# In the order of `qsearch.qtype.PRECISIONS`: from the most precise to the smallest.
PrecisionName = Literal["fp32", "tf32", "fp16", "int16", "int8", "fp8", "w4a8"]
# Fields that came after the first studies. At their defaults they are left out of the stable form, so that what was
# written without them keeps its hash.
_LATER = (
    "rules",
    "activations",
    "weight_symmetry",
    "rounding",
    "equalization",
    "bias_absorption",
    "migration",
    "bias_correction",
)


class Calibration(BaseModel):
    """How activation ranges are derived from the statistics record.

    Attributes:
        mode: One of max, percentile, kl_divergence, mse, global_scale.
        percentile: Share of values kept on each side, in percent; used by mode percentile only.
        global_scale: Assumed largest magnitude where no rule bounds a tensor; used by mode global_scale only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    mode: CalibrationMode = "max"
    percentile: Annotated[float, Field(gt=50.0, le=100.0)] = 99.99
    global_scale: Annotated[float, Field(gt=0.0, le=1e6)] = 8.0


class LayerRule(BaseModel):
    """What some layers do differently; of several rules that match a layer, the later wins.

    Attributes:
        types: The layers' types; none for any.
        layers: Names or globs, one of which the layer's has to match; none for any.
        position: 'first', 'last' or indices among all layers in graph order, negative ones from the end.
        precision: Their precision.
        calibration: How the ranges of their values are derived.
        granularity: Of their weight scales.
        weight_scale: As for `QuantConfig`.
        weight_symmetry: As for `QuantConfig`.
        rounding: As for `QuantConfig`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    types: tuple[LayerType, ...] = ()
    layers: tuple[str, ...] = ()
    position: Position | None = None
    precision: PrecisionName | None = None
    calibration: Calibration | None = None
    granularity: Granularity | None = None
    weight_scale: WeightScale | None = None
    weight_symmetry: Symmetry | None = None
    rounding: Rounding | None = None

    def which(self) -> dict[str, Any]:
        """The part that says which layers it is for, as plain types."""
        return self.model_dump(mode="json", include={"types", "layers", "position"})

    @model_validator(mode="after")
    def _says_which(self) -> LayerRule:
        if not self.types and not self.layers and self.position is None:
            raise ValueError("a rule needs 'types', 'layers' or 'position' to say which layers it is for")
        return self


@dataclass(frozen=True)
class WeightSettings:
    """How a layer's weights become integers; the fields are `QuantConfig`'s."""

    granularity: Granularity = "channel_wise"
    weight_scale: WeightScale = "max"
    weight_symmetry: Symmetry = "symmetric"
    rounding: Rounding = "nearest"


@dataclass(frozen=True)
class LayerSettings:
    """One layer's part of a configuration.

    Attributes:
        precision: Its name.
        calibration: Of the range of the layer's value.
        weights: Of its weights.
    """

    precision: str
    calibration: Calibration
    weights: WeightSettings


class QuantConfig(BaseModel):
    """One point of the search space, in a stable JSON form.

    Attributes:
        calibration: How activation ranges are derived.
        granularity: One weight scale per output channel, one per layer, or one per output channel with integer
            multipliers for groups of input channels (4-bit weights only; channel_wise for others).
        weight_scale: Largest magnitude, that rounded up to a power of two, or of least squared rounding error.
        default_precision: Precision of layers that nothing else names.
        precision: Layer name -> precision.
        skip: Names or globs of layers kept in fp32.
        skip_conv_layers: Indices of convolutions (in graph order) kept in fp32, or True for all.
        skip_dense_layers: Indices of linear layers kept in fp32, or True for all.
        rules: What groups of layers do differently.
        activations: Of 8-bit values: a zero point wherever zero is, or in the middle of the integers (at their lower end
            for a value that is never negative).
        weight_symmetry: Of 4-bit weights; others are symmetric, and so are those with one scale per layer.
        rounding: Of weights to integers: to the nearest, or so that the layer's output changes least; learned ones block
            after block, or layer after layer. Second order leaves the mean of what changes to `bias_correction`.
        equalization: Equalize the weight ranges of adjacent layers first.
        bias_absorption: Move large biases into the layers that follow first.
        migration: Share of the activations' range that linear layers' weights take over first, 0 to 1; 0 for none.
        bias_correction: Correct biases for the mean error of rounded weights, by batch-norm statistics or by recorded means.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[1] = 1
    calibration: Calibration = Calibration()
    granularity: Granularity = "channel_wise"
    weight_scale: WeightScale = "max"
    default_precision: PrecisionName = "int8"
    precision: dict[str, PrecisionName] = {}
    skip: tuple[str, ...] = ()
    skip_conv_layers: StrictBool | tuple[int, ...] = False
    skip_dense_layers: StrictBool | tuple[int, ...] = False
    rules: tuple[LayerRule, ...] = ()
    activations: Symmetry = "asymmetric"
    weight_symmetry: Symmetry = "symmetric"
    rounding: Rounding = "nearest"
    equalization: StrictBool = False
    bias_absorption: StrictBool = False
    migration: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    bias_correction: BiasCorrection = "none"

    def to_json(self) -> dict[str, Any]:
        """The stable JSON form: plain types, keys in a fixed order."""
        data = self.model_dump(mode="json")
        data["precision"] = dict(sorted(data["precision"].items()))
        for name in _LATER:
            if getattr(self, name) == type(self).model_fields[name].default:
                del data[name]
        data |= {"rules": [rule.model_dump(mode="json", exclude_defaults=True) for rule in self.rules]} if self.rules else {}
        return data

    @property
    def weights(self) -> WeightSettings:
        """How weights become integers where no rule says otherwise."""
        return WeightSettings(self.granularity, self.weight_scale, self.weight_symmetry, self.rounding)

    def ranges_key(self) -> str:
        """A text that two configurations share if they derive the ranges of 8-bit values alike."""
        rules = [(rule.which(), rule.calibration and rule.calibration.model_dump()) for rule in self.rules]
        return json.dumps([self.calibration.model_dump(), self.activations, rules])

    def weights_key(self) -> str:
        """A text that two configurations share if they round weights and correct biases alike."""
        rules = [(rule.which(), {name: getattr(rule, name) for name in vars(self.weights)}) for rule in self.rules]
        return json.dumps([vars(self.weights), self.bias_correction, rules])

    def content_hash(self) -> str:
        """Hexadecimal SHA-256 of the stable JSON form."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def resolve(self, layers: Mapping[str, LayerType]) -> dict[str, LayerSettings]:
        """Work out every layer's settings.

        Skips win over `precision`, which wins over `rules`, of which the later win, and these over the rest.

        Args:
            layers: Layer name -> type, for every layer, in graph order.

        Returns:
            Layer name -> settings, for every layer.

        Raises:
            SpaceError: A named layer, glob, index or rule matches nothing.
        """
        if unknown := sorted(set(self.precision) - set(layers)):
            raise SpaceError(f"precision names a layer that the model does not have: {unknown[0]!r}{_near(unknown[0], layers)}")
        result = dict.fromkeys(layers, LayerSettings(self.default_precision, self.calibration, self.weights))
        for number, rule in enumerate(self.rules):
            for name in matching_layers(rule, layers, f"rule {number + 1}"):
                result[name] = _overridden(result[name], rule)
        precision: dict[str, str] = dict(self.precision)
        for pattern in self.skip:
            matched = [name for name in layers if name == pattern or fnmatchcase(name, pattern)]
            if not matched:
                raise SpaceError(f"skip pattern {pattern!r} matches no layer{_near(pattern, layers)}")
            precision |= dict.fromkeys(matched, "fp32")
        dense = tuple(name for name, kind in layers.items() if kind == "dense")
        convolutions = tuple(name for name, kind in layers.items() if kind != "dense")
        for field, names in (("skip_conv_layers", convolutions), ("skip_dense_layers", dense)):
            precision |= dict.fromkeys(_indexed(field, getattr(self, field), names), "fp32")
        return {
            name: LayerSettings(precision.get(name, one.precision), one.calibration, one.weights) for name, one in result.items()
        }


def _overridden(settings: LayerSettings, rule: LayerRule) -> LayerSettings:
    weights = {name: getattr(rule, name) or given for name, given in vars(settings.weights).items()}
    calibration = rule.calibration or settings.calibration
    return LayerSettings(rule.precision or settings.precision, calibration, WeightSettings(**weights))


def matching_layers(rule: LayerRule, layers: Mapping[str, LayerType], what: str) -> list[str]:
    """The layers that a rule is for, in graph order.

    Args:
        rule: The rule.
        layers: Layer name -> type, for every layer, in graph order.
        what: What to call the rule in a message.

    Raises:
        SpaceError: It, or one of its names, is for none; the message names what comes near.
    """
    names = list(layers)
    for pattern in rule.layers:
        if not any(name == pattern or fnmatchcase(name, pattern) for name in names):
            raise SpaceError(f"{what}: {pattern!r} matches no layer{_near(pattern, names)}")
    indices = {"first": (0,), "last": (-1,)}[rule.position] if isinstance(rule.position, str) else rule.position
    for index in indices or ():
        if not -len(names) <= index < len(names):
            bounds = f"0 to {len(names) - 1}, or from -1 down"
            raise SpaceError(f"{what}: there is no layer {index}, the model has {len(names)} ({bounds})")
    places = None if indices is None else {index % len(names) for index in indices}
    found = [
        name
        for index, (name, kind) in enumerate(layers.items())
        if (not rule.types or kind in rule.types)
        and (not rule.layers or any(name == pattern or fnmatchcase(name, pattern) for pattern in rule.layers))
        and (places is None or index in places)
    ]
    if not found:
        kinds = ", ".join(sorted(set(layers.values())))
        raise SpaceError(f"{what} matches no layer of the model, whose layers are of the types {kinds}{_near('', names)}")
    return found


def _indexed(field: str, choice: bool | tuple[int, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(choice, bool):
        return names if choice else ()
    for index in choice:
        if not 0 <= index < len(names):
            raise SpaceError(f"{field} has index {index}, but the model has {len(names)} such layers (0 to {len(names) - 1})")
    return tuple(names[index] for index in choice)


def _near(name: str, layers: Iterable[str], most: int = 6) -> str:
    """The names that come near one, or else some of all, as the end of a message."""
    names = list(layers)
    if close := difflib.get_close_matches(name.replace("*", ""), names, n=3, cutoff=0.5):
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return "; layers are: " + ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def validation_message(error: ValidationError) -> str:
    """The first problem of a pydantic error as one readable clause."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function-"))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {shortened(where)}{more}"
    return f"{where}: {first['msg']}, got {shortened(first['input'])}{more}"


def named_config(name: str) -> QuantConfig:
    """A configuration by name: a precision for every layer, or a JSON file.

    Raises:
        SpaceError: There is no such precision, or the file is not valid.
    """
    if name in get_args(PrecisionName):
        return QuantConfig.model_validate({"default_precision": name})
    if not name.endswith(".json"):
        known = ", ".join(get_args(PrecisionName))
        raise SpaceError(f"unknown precision {name!r}: use {known}, or a configuration file ending in .json")
    return load_config(Path(name))


def load_config(path: Path) -> QuantConfig:
    """Read a configuration from a JSON file.

    Raises:
        SpaceError: The file is missing, is not JSON, or holds an unknown key or an impossible value.
    """
    try:
        return QuantConfig.model_validate_json(read_file(path))
    except OSError as error:
        raise SpaceError(f"cannot read configuration {path}: {error.strerror}") from error
    except ValidationError as error:
        raise SpaceError(f"configuration {path} is not valid: {validation_message(error)}") from error
    except ValueError as error:
        raise SpaceError(f"cannot read configuration {path}: {error}") from error
