"""A search space bound to a model's layers: the parameters a sampler sees and the configurations they mean."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import optuna

from qsearch.config import Calibration, LayerRule, QuantConfig, matching_layers
from qsearch.errors import SpaceError
from qsearch.models.graph import Graph, Node
from qsearch.qtype import UNSCALED
from qsearch.search.space import CalibrationChoices, RuleChoices, SearchSpace

__all__ = ["CALIBRATION", "GRANULARITY", "PERCENTILE_TAIL", "WEIGHT_SCALE", "BoundSpace", "Choices", "LogRange", "bind_space"]

CALIBRATION = "calibration"
# The share of values beyond the percentile, in percent: 100 - p. Ranges react to its logarithm.
PERCENTILE_TAIL = "percentile_tail"
GRANULARITY = "granularity"
WEIGHT_SCALE = "weight_scale"
# Parameter name, which is also `QuantConfig`'s, -> `SearchSpace`'s name of its choices.
WEIGHTS = {
    GRANULARITY: "granularities",
    WEIGHT_SCALE: "weight_scales",
    "weight_symmetry": "weight_symmetries",
    "rounding": "roundings",
}
METHODS = {
    "activations": "activations",
    "equalization": "equalizations",
    "bias_absorption": "bias_absorptions",
    "migration": "migrations",
    "bias_correction": "bias_corrections",
}


@dataclass(frozen=True)
class Choices:
    """A parameter with a few values; one that has a single value is never suggested."""

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class LogRange:
    """A positive real parameter sampled on a log scale, kept to two digits so that equal means equal."""

    name: str
    low: float
    high: float

    @property
    def values(self) -> tuple[float, ...]:
        """Every value of two significant digits within the range."""
        decades = range(math.floor(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
        grid = (_two_digits(digits * 10.0 ** (decade - 1)) for decade in decades for digits in range(10, 100))
        ends = (_two_digits(self.low), _two_digits(self.high))
        return tuple(sorted({*ends, *(value for value in grid if self.low <= value <= self.high)}))


Parameter = Choices | LogRange


@dataclass(frozen=True)
class BoundSpace:
    """A search space over the layers of one model.

    Attributes:
        space: The space.
        graph: The model's layers.
        layers: Per layer, in graph order, the precisions it may take; the parameter is named after the layer.
        settings: Calibration mode, percentile tail, how weights are rounded, methods; those of rule n begin with 'rule_n_'.
        idle: Methods that find nothing to do in the model, so that they are left as they are.
    """

    space: SearchSpace
    graph: Graph
    layers: tuple[Choices, ...]
    settings: tuple[Parameter, ...]
    idle: frozenset[str] = frozenset()

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Those with more than one value, in the order in which they are suggested."""
        return tuple(one for one in (*self.settings, *self.layers) if len(one.values) > 1)

    @cached_property
    def size(self) -> int:
        """Number of combinations; an upper bound on the number of distinct configurations."""
        return math.prod(len(one.values) for one in self.parameters)

    def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """Optuna's description of every parameter.

        Joint samplers learn only from parameters that every trial has, so all of them always take part, the
        percentile too where another mode is chosen.
        """
        return {one.name: _distribution(one) for one in self.parameters}

    def config(self, values: Mapping[str, Any]) -> QuantConfig:
        """The configuration that parameter values mean, in canonical form.

        Two sets of values that compile to the same module give equal configurations: what has no effect (the
        percentile of another mode, the calibration of a module of float layers) takes its default.

        Args:
            values: Parameter name -> value; parameters with a single value may be left out.
        """
        value = {one.name: values.get(one.name, one.values[0]) for one in (*self.settings, *self.layers)}
        precision = {layer.name: value[layer.name] for layer in self.layers}
        used = set(precision.values()).difference(UNSCALED)
        if not used:
            return QuantConfig(default_precision="fp32", precision=precision)
        chosen = {name: value[name] for name in METHODS if name in value}
        if not used & {"int8", "w4a8"}:
            # 16 bits need none of it.
            chosen = {name: one for name, one in chosen.items() if name not in ("activations", "rounding", "bias_correction")}
        rules = (self._rule(number, value, precision) for number in range(len(self.space.rules)))
        return QuantConfig(
            calibration=_calibration(value, "", self.space.calibration),
            **_weights(value, "", used),
            default_precision="fp32",
            precision=precision,
            **chosen,
            rules=tuple(rule for rule in rules if rule is not None),
        )

    def _rule(self, number: int, value: Mapping[str, Any], precision: Mapping[str, str]) -> LayerRule | None:
        """What a rule means under parameter values; None where it has no effect. Precisions are named layer by layer."""
        choices, prefix = self.space.rules[number], _prefix(number)
        which = LayerRule(types=choices.types, layers=choices.layers, position=choices.position)
        used = {precision[name] for name in matching_layers(which, self.graph.layer_types, "rule")}.difference(UNSCALED)
        chosen: dict[str, Any] = _weights(value, prefix, used) if used else {}
        if used and choices.calibration is not None:
            chosen["calibration"] = _calibration(value, prefix, choices.calibration)
        return which.model_copy(update=chosen) if chosen else None

    def start_values(self) -> dict[str, Any]:
        """Parameter values of the configuration that the space's name stands for."""
        start = self.space.start
        values: dict[str, Any] = {
            one.name: start.precision if start.precision in one.values else one.values[0] for one in self.layers
        }
        for one in self.settings:
            middle = one.values[len(one.values) // 2] if isinstance(one, LogRange) else one.values[0]
            values[one.name] = middle
        named = (name for name in (*WEIGHTS, *METHODS) if name not in self.idle)
        given: dict[str, Any] = {name: getattr(start, name) for name in named if getattr(start, name) is not None}
        if start.calibration is not None:
            given[CALIBRATION] = start.calibration.mode
            if start.calibration.mode == "percentile":
                given[PERCENTILE_TAIL] = _two_digits(100.0 - start.calibration.percentile)
        by_name = {one.name: one for one in self.settings}
        for name, value in given.items():
            if name not in by_name or (isinstance(by_name[name], Choices) and value not in by_name[name].values):
                raise self.space.error(("start", name), f"start: {name} is {value!r}, which the space does not allow")
        return values | given

    def all_values(self) -> Iterator[dict[str, Any]]:
        """Every combination of parameter values; only for small spaces."""
        names = [one.name for one in self.parameters]
        for combination in itertools.product(*(one.values for one in self.parameters)):
            yield dict(zip(names, combination, strict=True))


def bind_space(space: SearchSpace, graph: Graph, idle: Callable[[], Collection[str]] = frozenset) -> BoundSpace:
    """Work out what a space allows for each layer of a model.

    Args:
        space: The search space.
        graph: The model's layers.
        idle: Gives the methods that find nothing to do in the model; asked only if the space opens one. A search that
            varied them would measure the same modules over and over.

    Returns:
        The bound space.

    Raises:
        SpaceError: A name, glob or index matches no layer, two globs contradict each other on a layer, or the
            model has no layer to search.
    """
    if not graph.layers:
        raise SpaceError("the model has no convolution and no linear layer, so there is nothing to search")
    _check_names(space, graph)
    kept = _skipped(space, graph)
    layers = tuple(Choices(node.name, ("fp32",) if node.name in kept else _allowed(space, graph, node)) for node in graph.layers)
    settings = _settings(space, "")
    methods = {name: getattr(space, field) for name, field in METHODS.items()}
    left = frozenset(idle()) if any(len(values) > 1 for values in methods.values()) else frozenset()
    settings += [Choices(name, values[:1] if name in left else values) for name, values in methods.items()]
    for number, rule in enumerate(space.rules):
        settings += _settings(rule, _prefix(number))
    if all(set(layer.values) <= set(UNSCALED) for layer in layers):
        settings = [Choices(one.name, one.values[:1]) for one in settings]
    return BoundSpace(space, graph, layers, tuple(settings), left)


def _prefix(number: int) -> str:
    return f"rule_{number + 1}_"


def _settings(section: SearchSpace | RuleChoices, prefix: str) -> list[Parameter]:
    """The parameters of calibration and weights that a space or one of its rules opens."""
    found: list[Parameter] = []
    if section.calibration is not None:
        low, high = section.calibration.percentile
        found.append(Choices(prefix + CALIBRATION, section.calibration.modes))
        if "percentile" in section.calibration.modes:
            found.append(LogRange(prefix + PERCENTILE_TAIL, round(100.0 - high, 9), round(100.0 - low, 9)))
    given = {name: getattr(section, field) for name, field in WEIGHTS.items()}
    return found + [Choices(prefix + name, values) for name, values in given.items() if values is not None]


def _calibration(value: Mapping[str, Any], prefix: str, choices: CalibrationChoices) -> Calibration:
    mode = value[prefix + CALIBRATION]
    chosen: dict[str, Any] = {"mode": mode}
    if mode == "percentile":
        chosen["percentile"] = round(100.0 - _two_digits(value[prefix + PERCENTILE_TAIL]), 9)
    if mode == "global_scale":
        chosen["global_scale"] = choices.global_scale
    return Calibration(**chosen)


def _weights(value: Mapping[str, Any], prefix: str, used: set[str]) -> dict[str, Any]:
    """How weights are rounded, as far as that is open or set and some layer's precision makes it count."""
    chosen = {name: value[prefix + name] for name in WEIGHTS if prefix + name in value}
    if chosen.get("rounding", "nearest") != "nearest" and chosen.get(WEIGHT_SCALE) == "mse":
        # Other roundings look for scales of their own.
        chosen[WEIGHT_SCALE] = "max"
    if "w4a8" not in used or chosen.get(GRANULARITY) == "layer_wise":
        chosen.pop("weight_symmetry", None)
    if "w4a8" not in used and chosen.get(GRANULARITY) == "group_wise":
        chosen[GRANULARITY] = "channel_wise"
    if not used & {"int8", "w4a8"}:
        chosen.pop("rounding", None)
        if chosen.get(WEIGHT_SCALE) == "mse":
            chosen[WEIGHT_SCALE] = "max"
    return chosen


def _distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    if isinstance(parameter, LogRange):
        return optuna.distributions.FloatDistribution(parameter.low, parameter.high, log=True)
    return optuna.distributions.CategoricalDistribution(parameter.values)


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")


def _allowed(space: SearchSpace, graph: Graph, node: Node) -> tuple[str, ...]:
    for number in reversed(range(len(space.rules))):
        rule = space.rules[number]
        if rule.precisions is not None and node.name in _matched(space, graph, number):
            return rule.precisions
    choices = space.precisions
    if node.name in choices.layers:
        return choices.layers[node.name]
    globs = {glob: allowed for glob, allowed in choices.layers.items() if fnmatchcase(node.name, glob)}
    if len(set(globs.values())) > 1:
        last = list(globs)[-1]
        raise space.error(
            ("precisions", "layers", last),
            f"layer {node.name!r} is matched by {' and '.join(map(repr, globs))}, which allow different precisions; "
            f"add an entry for {node.name!r} itself",
        )
    if globs:
        return next(iter(globs.values()))
    return choices.types.get(graph.layer_types[node.name], choices.default)


def _matched(space: SearchSpace, graph: Graph, number: int) -> list[str]:
    """The layers of a rule."""
    rule = space.rules[number]
    which = LayerRule(types=rule.types, layers=rule.layers, position=rule.position)
    try:
        return matching_layers(which, graph.layer_types, f"rule {number + 1}")
    except SpaceError as error:
        raise space.error(("rules", number), str(error)) from None


def _skipped(space: SearchSpace, graph: Graph) -> set[str]:
    kept: set[str] = set()
    for index, pattern in enumerate(space.skip):
        kept |= set(_matches(space, graph, pattern, ("skip", index)))
    by_index = (
        ("skip_conv_layers", space.skip_conv_layers, graph.convolutions),
        ("skip_dense_layers", space.skip_dense_layers, graph.dense),
    )
    for field, choice, names in by_index:
        if isinstance(choice, bool):
            kept |= set(names) if choice else set()
            continue
        for place, index in enumerate(choice):
            if not 0 <= index < len(names):
                bounds = f"0 to {len(names) - 1}" if names else "leave the key out"
                raise space.error(
                    (field, place), f"{field} has index {index}, but the model has {len(names)} such layers ({bounds})"
                )
            kept.add(names[index])
    return kept


def _check_names(space: SearchSpace, graph: Graph) -> None:
    for pattern in space.precisions.layers:
        _matches(space, graph, pattern, ("precisions", "layers", pattern))
    for number in range(len(space.rules)):
        _matched(space, graph, number)
    for reserved in (CALIBRATION, PERCENTILE_TAIL, *WEIGHTS, *METHODS):
        if reserved in graph.by_name and graph.by_name[reserved].is_layer:
            raise SpaceError(f"the model has a layer called {reserved!r}, the name of a search parameter; rename that module")


def _matches(space: SearchSpace, graph: Graph, pattern: str, location: tuple[str | int, ...]) -> list[str]:
    names = [node.name for node in graph.layers]
    matched = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
    if not matched:
        some = ", ".join(names[:6]) + (f", ... ({len(names)} in all)" if len(names) > 6 else "")
        raise space.error(location, f"{location[0]}: {pattern!r} matches no layer of the model; layers are: {some}")
    return matched
