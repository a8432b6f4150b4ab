"""Search spaces: the YAML file that says which configurations may be tried.

A file is validated key by key when it is read, and against the model's layers when it is bound to a graph
(`qsearch.search.bound_space`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, StrictBool, ValidationError, model_validator

import qsearch
from qsearch.bounded import shortened
from qsearch.config import (
    BiasCorrection,
    Calibration,
    CalibrationMode,
    Granularity,
    LayerType,
    Position,
    PrecisionName,
    Rounding,
    Symmetry,
    WeightScale,
)
from qsearch.errors import SpaceError
from qsearch.search.yaml_source import YamlSource, read_yaml

__all__ = ["CalibrationChoices", "PrecisionChoices", "RuleChoices", "SearchSpace", "Start", "load_space", "preset_names"]

VERSION = 1
_SHOWN = 200
Choice = TypeVar("Choice")


def _in_order_of(names: Any) -> Any:
    """A validator: at least one choice, none twice, in the order in which `names` lists them.

    A fixed order makes spaces that allow the same things equal, whatever order they were written in.
    """
    order = get_args(names)

    def check(choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
        if not choices:
            raise ValueError("at least one choice is needed")
        if len(set(choices)) < len(choices):
            raise ValueError("a choice is listed twice")
        return tuple(sorted(choices, key=order.index))

    return AfterValidator(check)


def _distinct(choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
    if not choices:
        raise ValueError("at least one choice is needed")
    if len(set(choices)) < len(choices):
        raise ValueError("a choice is listed twice")
    return tuple(sorted(choices))  # type: ignore[type-var]


Precisions = Annotated[tuple[PrecisionName, ...], _in_order_of(PrecisionName)]
Granularities = Annotated[tuple[Granularity, ...], _in_order_of(Granularity)]
WeightScales = Annotated[tuple[WeightScale, ...], _in_order_of(WeightScale)]
Symmetries = Annotated[tuple[Symmetry, ...], _in_order_of(Symmetry)]
Roundings = Annotated[tuple[Rounding, ...], _in_order_of(Rounding)]
Switch = Annotated[tuple[StrictBool, ...], AfterValidator(_distinct)]
# Fields that came after the first studies: left out of a space's hash where they say nothing.
_LATER = (
    "activations",
    "weight_symmetries",
    "roundings",
    "equalizations",
    "bias_absorptions",
    "migrations",
    "bias_corrections",
    "rules",
)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PrecisionChoices(_Section):
    """Which precisions a layer may take; the most specific entry that matches a layer wins.

    Attributes:
        default: For layers that nothing below matches.
        types: By layer type: conv (depthwise excepted), depthwise, dense.
        layers: By layer name or glob; a name wins over a glob.
    """

    default: Precisions = ("fp32", "int8")
    types: dict[LayerType, Precisions] = {}
    layers: dict[str, Precisions] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Every precision that some layer may take."""
        choices = (self.default, *self.types.values(), *self.layers.values())
        return tuple(dict.fromkeys(name for choice in choices for name in choice))


class CalibrationChoices(_Section):
    """How activation ranges may be derived.

    Attributes:
        modes: Allowed calibration modes.
        percentile: (low, high) of mode percentile, in percent. Sampled on a log scale of 100 - p.
        global_scale: The magnitude that mode global_scale assumes where no rule bounds a tensor.
    """

    modes: Annotated[tuple[CalibrationMode, ...], _in_order_of(CalibrationMode)] = ("max", "percentile", "kl_divergence", "mse")
    percentile: tuple[Annotated[float, Field(gt=50.0, lt=100.0)], Annotated[float, Field(gt=50.0, le=99.9999)]] = (99.0, 99.999)
    global_scale: Annotated[float, Field(gt=0.0, le=1e6)] = 8.0

    @model_validator(mode="after")
    def _low_is_not_above_high(self) -> CalibrationChoices:
        if self.percentile[0] > self.percentile[1]:
            raise ValueError("percentile is [low, high]: low must not be above high")
        return self


class RuleChoices(_Section):
    """What some layers may do differently; of several rules that match a layer, the later wins.

    Attributes:
        types: The layers' types; none for any.
        layers: Names or globs, one of which the layer's has to match; none for any.
        position: 'first', 'last' or indices among all layers in graph order, negative ones from the end.
        precisions: Which they may take, whatever `SearchSpace.precisions` says.
        calibration: How the ranges of their values may be derived.
        granularities: As for `SearchSpace`; this and the following are the layers' own where given.
        weight_scales: As for `SearchSpace`.
        weight_symmetries: As for `SearchSpace`.
        roundings: As for `SearchSpace`.
    """

    types: tuple[LayerType, ...] = ()
    layers: tuple[str, ...] = ()
    position: Position | None = None
    precisions: Precisions | None = None
    calibration: CalibrationChoices | None = None
    granularities: Granularities | None = None
    weight_scales: WeightScales | None = None
    weight_symmetries: Symmetries | None = None
    roundings: Roundings | None = None

    @model_validator(mode="after")
    def _says_which(self) -> RuleChoices:
        if not self.types and not self.layers and self.position is None:
            raise ValueError("a rule needs 'types', 'layers' or 'position' to say which layers it is for")
        return self


class Start(_Section):
    """The configuration that a space's name stands for; what is not given is the first choice of the space.

    Attributes:
        precision: Of every layer that may have it; the others take their first choice.
        calibration: Mode and parameters.
        granularity: Of weight scales; this and the following as for `QuantConfig`.
        weight_scale: As for `QuantConfig`.
        activations: As for `QuantConfig`.
        weight_symmetry: As for `QuantConfig`.
        rounding: As for `QuantConfig`.
        equalization: As for `QuantConfig`.
        bias_absorption: As for `QuantConfig`.
        migration: As for `QuantConfig`.
        bias_correction: As for `QuantConfig`.
    """

    precision: PrecisionName | None = None
    calibration: Calibration | None = None
    granularity: Granularity | None = None
    weight_scale: WeightScale | None = None
    activations: Symmetry | None = None
    weight_symmetry: Symmetry | None = None
    rounding: Rounding | None = None
    equalization: StrictBool | None = None
    bias_absorption: StrictBool | None = None
    migration: float | None = None
    bias_correction: BiasCorrection | None = None


class SearchSpace(_Section):
    """What a search may vary.

    Attributes:
        version: Version of this file format.
        name: For messages and reports; not part of the space's identity.
        precisions: Per layer.
        calibration: Of activations.
        granularities: Of weight scales.
        weight_scales: Plain, rounded up to a power of two, or of least squared error.
        skip: Names or globs of layers kept in fp32.
        skip_conv_layers: Indices of convolutions kept in fp32, or True for all.
        skip_dense_layers: Indices of linear layers kept in fp32, or True for all.
        activations: Zero points of 8-bit values.
        weight_symmetries: Of 4-bit weights.
        roundings: Of weights.
        equalizations: Of adjacent layers' weight ranges.
        bias_absorptions: Of large biases into the layers that follow.
        migrations: Shares of the activations' range that linear layers' weights take over.
        bias_corrections: For the mean error of rounded weights.
        rules: What groups of layers may do differently.
        start: What `evaluate --preset` measures; not part of the space's identity.
    """

    version: int
    name: str = ""
    precisions: PrecisionChoices = PrecisionChoices()
    calibration: CalibrationChoices = CalibrationChoices()
    granularities: Granularities = ("channel_wise",)
    weight_scales: WeightScales = ("max",)
    skip: tuple[str, ...] = ()
    skip_conv_layers: StrictBool | tuple[int, ...] = False
    skip_dense_layers: StrictBool | tuple[int, ...] = False
    activations: Symmetries = ("asymmetric",)
    weight_symmetries: Symmetries = ("symmetric",)
    roundings: Roundings = ("nearest",)
    equalizations: Switch = (False,)
    bias_absorptions: Switch = (False,)
    migrations: Annotated[tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...], AfterValidator(_distinct)] = (0.0,)
    bias_corrections: Annotated[tuple[BiasCorrection, ...], _in_order_of(BiasCorrection)] = ("none",)
    rules: tuple[RuleChoices, ...] = ()
    start: Start = Start()
    _source: YamlSource | None = PrivateAttr(None)

    def content_hash(self) -> str:
        """Hexadecimal SHA-256 of what the space means: comments, order and its name do not count."""
        data = self.model_dump(mode="json", exclude={"name", "start"})
        for field in _LATER:
            if getattr(self, field) == type(self).model_fields[field].default:
                del data[field]
        for field in ("skip", "skip_conv_layers", "skip_dense_layers"):
            if isinstance(data[field], list):
                data[field] = sorted(set(data[field]))
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def error(self, location: tuple[str | int, ...], message: str) -> SpaceError:
        """A SpaceError at a key of this space, with file and line where it came from a file."""
        if self._source is not None:
            return self._source.error(location, message)
        return SpaceError(f"search space {self.name!r}: {message}")


def load_space(path_or_name: str | Path) -> SearchSpace:
    """Read a search space.

    Args:
        path_or_name: A YAML file, or the name of a preset such as 'default'.

    Returns:
        The validated space.

    Raises:
        SpaceError: There is no such file or preset, or it is not a valid search space.
    """
    path = _find(str(path_or_name))
    source = read_yaml(path)
    version = source.data.get("version")
    if version != VERSION or isinstance(version, bool):
        came = "none is given" if version is None else f"got {shortened(version)}"
        raise source.error(("version",), f"this qsearch reads search spaces of 'version: {VERSION}', {came}")
    try:
        space = SearchSpace.model_validate(source.data)
    except ValidationError as error:
        raise _explain(error, source) from error
    if not space.name:
        space = space.model_copy(update={"name": path.stem})
    space._source = source
    return space


def preset_names() -> list[str]:
    """Names of the search spaces that come with qsearch."""
    return sorted(path.stem for path in _preset_folder().glob("*.yaml"))


def _preset_folder() -> Path:
    # An installed package carries the presets inside; a checkout has them at its top level.
    package = Path(qsearch.__file__).parent
    inside = package / "spaces"
    return inside if inside.is_dir() else package.parent / "spaces"


def _find(path_or_name: str) -> Path:
    preset = _preset_folder() / f"{path_or_name}.yaml"
    if path_or_name in preset_names():
        return preset
    path = Path(path_or_name)
    if path.is_file():
        return path
    raise SpaceError(
        f"no search space {path_or_name!r}: no such file, and the presets are {', '.join(preset_names())}; "
        "give --space one of these or a YAML file"
    )


def _explain(error: ValidationError, source: YamlSource) -> SpaceError:
    """The first problem of a pydantic error, at its line, with the way out."""
    first = error.errors()[0]
    location = tuple(part for part in first["loc"] if part != "[key]" and not _is_union_branch(part))
    key = ".".join(str(part) for part in location)[:_SHOWN]
    more = f" (and {error.error_count() - 1} more problems)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        allowed = _keys_beside(location)
        close = difflib.get_close_matches(str(location[-1])[:_SHOWN], allowed, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"allowed here: {', '.join(allowed)}"
        return source.error(location, f"unknown key {key!r}; {hint}{more}")
    message = first["msg"].removeprefix("Value error, ")
    return source.error(location, f"{key}: {message[0].lower()}{message[1:]}, got {shortened(first['input'])}{more}")


def _is_union_branch(part: str | int) -> bool:
    return isinstance(part, str) and (part == "bool" or part.startswith(("tuple[", "function-")))


def _keys_beside(location: tuple[str | int, ...]) -> list[str]:
    section: type[BaseModel] = SearchSpace
    for part in location[:-1]:
        field = section.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            break
        section = field.annotation
    return list(section.model_fields)
