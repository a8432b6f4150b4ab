"""A quantization configuration: everything that distinguishes one trial from another."""

from __future__ import annotations

import hashlib
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from qsearch.errors import SpaceError

__all__ = [
    "Calibration",
    "CalibrationMode",
    "Granularity",
    "QuantConfig",
    "WeightScale",
    "load_config",
    "named_config",
    "validation_message",
]

CalibrationMode = Literal["max", "percentile", "kl_divergence", "mse", "global_scale"]
Granularity = Literal["channel_wise", "layer_wise"]
WeightScale = Literal["max", "power_of_two"]
# In the order of `qsearch.qtype.PRECISIONS`: from the most precise to the smallest.
PrecisionName = Literal["fp32", "int16", "int8", "w4a8"]


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


class QuantConfig(BaseModel):
    """One point of the search space, in a stable JSON form.

    Attributes:
        calibration: How activation ranges are derived.
        granularity: One weight scale per output channel or one per layer.
        weight_scale: Largest magnitude, or that rounded up to a power of two.
        default_precision: Precision of layers that nothing else names.
        precision: Layer name -> precision.
        skip: Names or globs of layers kept in fp32.
        skip_conv_layers: Indices of convolutions (in graph order) kept in fp32, or True for all.
        skip_dense_layers: Indices of linear layers kept in fp32, or True for all.
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

    def to_json(self) -> dict:
        """The stable JSON form: plain types, keys in a fixed order."""
        data = self.model_dump(mode="json")
        data["precision"] = dict(sorted(data["precision"].items()))
        return data

    def content_hash(self) -> str:
        """Hexadecimal SHA-256 of the stable JSON form."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def resolve(self, convolutions: tuple[str, ...], dense: tuple[str, ...]) -> dict[str, str]:
        """Work out every layer's precision.

        Skips win over `precision`, which wins over `default_precision`.

        Args:
            convolutions: Names of the convolution layers, in graph order.
            dense: Names of the linear layers, in graph order.

        Returns:
            Layer name -> precision name, for every layer.

        Raises:
            SpaceError: A named layer, glob or index matches nothing.
        """
        layers = (*convolutions, *dense)
        unknown = sorted(set(self.precision) - set(layers))
        if unknown:
            raise SpaceError(f"precision names a layer that the model does not have: {unknown[0]!r}; layers are: {_some(layers)}")
        result: dict[str, str] = {name: self.precision.get(name, self.default_precision) for name in layers}
        for pattern in self.skip:
            matched = [name for name in layers if name == pattern or fnmatchcase(name, pattern)]
            if not matched:
                raise SpaceError(f"skip pattern {pattern!r} matches no layer; layers are: {_some(layers)}")
            result |= dict.fromkeys(matched, "fp32")
        for field, names in (("skip_conv_layers", convolutions), ("skip_dense_layers", dense)):
            result |= dict.fromkeys(_indexed(field, getattr(self, field), names), "fp32")
        return result


def _indexed(field: str, choice: bool | tuple[int, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(choice, bool):
        return names if choice else ()
    for index in choice:
        if not 0 <= index < len(names):
            raise SpaceError(f"{field} has index {index}, but the model has {len(names)} such layers (0 to {len(names) - 1})")
    return tuple(names[index] for index in choice)


def _some(names: tuple[str, ...], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def validation_message(error: ValidationError) -> str:
    """The first problem of a pydantic error as one readable clause."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function-"))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {where!r}{more}"
    return f"{where}: {first['msg']}, got {first['input']!r}{more}"


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
        return QuantConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpaceError(f"cannot read configuration {path}: {error.strerror}") from error
    except ValidationError as error:
        raise SpaceError(f"configuration {path} is not valid: {validation_message(error)}") from error
