"""Lower a layer graph under one configuration to an integer program.

The forms of all values are assigned first (`assign`); then every node is written once, with the conversions
its readers need. What a node's operation computes is defined in `qsearch.quantize.program`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from qsearch.config import QuantConfig, Symmetry
from qsearch.models.graph import MOVES, Model, Node
from qsearch.qtype import INT16
from qsearch.quantize.affine import HALF, Affine, affine_from_range, float8_from_range, symmetric_from_range
from qsearch.quantize.assign import (
    FIRST,
    FLOAT,
    FLOAT8_FORM,
    FLOAT16_FORM,
    INT16_FORM,
    ROUNDED_FORMS,
    SHARED,
    UINT8_FORM,
    Assignment,
    assign_forms,
)
from qsearch.quantize.lower_attention import ATTENTION_LOWERINGS, lower_gather
from qsearch.quantize.lower_nodes import NODE_LOWERINGS, Context
from qsearch.quantize.program import Op, OpKey, Program, Value
from qsearch.quantize.rounding.learned import RoundedLayer
from qsearch.quantize.scalars import output_scalars, scalars
from qsearch.quantize.shared_ranges import shared_ranges
from qsearch.quantize.weight_store import WeightStore

__all__ = ["lower", "precisions", "value_affines"]

Ranges = dict[str, tuple[float, float]]
Means = Mapping[str, np.ndarray]
Learned = Mapping[str, RoundedLayer]
LOWERINGS = NODE_LOWERINGS | ATTENTION_LOWERINGS


def precisions(model: Model, config: QuantConfig) -> dict[str, str]:
    """Every layer's precision under a configuration.

    Raises:
        SpaceError: The configuration names a layer that the model does not have.
    """
    return {name: one.precision for name, one in config.resolve(model.graph.layer_types).items()}


def lower(
    model: Model,
    config: QuantConfig,
    ranges: Ranges,
    weights: WeightStore,
    means: Means = MappingProxyType({}),
    learned: Learned = MappingProxyType({}),
) -> Program:
    """Lower a model.

    Args:
        model: The model.
        config: Precisions, granularity and weight scales; its calibration is already in `ranges`.
        ranges: Node name -> (low, high) of its value, for every node.
        weights: Prepared weights, shared between trials.
        means: Layer name -> mean of what its kernel reads, float64 (I, kh, kw); biases are corrected where it is known.

        learned: Layer name -> its rounding, of layers that do not take theirs from `weights`.

    Returns:
        The program; its input is float32 (N, C, H, W), its output float32 (N, classes).

    Raises:
        QuantizeError: A tensor or layer cannot be represented.
        SpaceError: The configuration names a layer that the model does not have.
    """
    layers = config.resolve(model.graph.layer_types)
    assignment = assign_forms(model.graph, {name: one.precision for name, one in layers.items()})
    affines = value_affines(model, assignment, ranges, weights, config.activations)
    writer = _Writer(model, assignment, affines)
    context = Context(model, layers, assignment, affines, weights, means, learned)
    for node in model.graph.nodes:
        writer.write(node, context)
    output = writer.forms[model.graph.output, FLOAT]
    by_value = {f"{name}:{form}": affine for (name, form), affine in affines.items()}
    return Program(writer.input, tuple(writer.ops), output, by_value)


def value_affines(
    model: Model, assignment: Assignment, ranges: Ranges, weights: WeightStore, symmetry: Symmetry = "asymmetric"
) -> dict[tuple[str, str], Affine]:
    """Scale and zero point of every value that exists in integers or float8; `HALF` for those that exist in float16.

    Args:
        model: The model.
        assignment: The forms of its values.
        ranges: Node name -> (low, high) of its value, for every node.
        weights: Prepared weights, whose sums bound 16-bit integers.
        symmetry: Of 8-bit values.

    Returns:
        (Node name, form) -> scale and zero point, for all forms but float32.

    Raises:
        QuantizeError: A tensor cannot be represented.
    """
    in_bytes = frozenset(name for name, form in assignment.computes.items() if form == UINT8_FORM)
    if in_bytes:
        ranges = shared_ranges(model.graph, in_bytes, ranges)
    affines: dict[tuple[str, str], Affine] = {}
    limits = _int16_limits(model, assignment, weights)
    for node in model.graph.nodes:
        computes = assignment.computes[node.name]
        for form in ROUNDED_FORMS:
            key = node.name, form
            # A move is not carried out where nothing wants it.
            if form not in assignment.wanted[node.name] and (form != computes or node.op in MOVES):
                continue
            if form == FLOAT16_FORM:
                affines[key] = HALF
            elif node.op in MOVES or (node.op in SHARED and form == computes):
                affines[key] = affines[node.inputs[0], form]
            elif form == UINT8_FORM:
                affines[key] = affine_from_range(node.name, *ranges[node.name], symmetry)
            elif form == FLOAT8_FORM:
                affines[key] = float8_from_range(node.name, *ranges[node.name])
            else:
                affines[key] = symmetric_from_range(node.name, *ranges[node.name], limits[node.name])
    return affines


def _int16_limits(model: Model, assignment: Assignment, weights: WeightStore) -> dict[str, int]:
    """Largest integer of every value's int16 form, such that no int16 layer that reads it can overflow."""
    limits: dict[str, int] = {}
    for node in reversed(model.graph.nodes):
        limit = INT16.activation.qmax
        for reader in model.graph.consumers[node.name]:
            if reader.op in MOVES:
                limit = min(limit, limits[reader.name])
            elif assignment.computes[reader.name] != INT16_FORM:
                continue
            elif reader.op in SHARED:
                limit = min(limit, limits[reader.name])
            elif reader.is_layer and reader.inputs[0] == node.name:
                limit = min(limit, weights.activation_limit(reader.name, model.parameters.weight[reader.name]))
        limits[node.name] = limit
    return limits


def _dtype(form: str) -> str:
    return form if form in ROUNDED_FORMS else "float32"


def physical(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Channels-last shape of a logical shape."""
    return (shape[0], shape[2], shape[3], shape[1]) if len(shape) == 4 else shape


@dataclass
class _Writer:
    """The program while it is being written."""

    model: Model
    assignment: Assignment
    affines: dict[tuple[str, str], Affine]
    ops: list[Op] = field(default_factory=list)
    forms: dict[tuple[str, str], Value] = field(default_factory=dict)

    @property
    def input(self) -> Value:
        """The program's input."""
        node = self.model.graph.input
        return Value(node.name, node.shape, "float32")

    def write(self, node: Node, context: Context) -> None:
        """Write a node's operation, then the other forms its readers want."""
        form = self.assignment.produced[node.name]
        shape = node.shape if form == FIRST else physical(node.shape)
        value = Value(f"{node.name}:{form}", shape, _dtype(form))
        if node.op == "input":
            self._input(node, value)
        elif node.op == "flatten":
            self._flatten(node, value)
        elif node.op in MOVES:
            self._move(node, context)
            return
        else:
            inputs = [self.forms[name, form] for name, form in zip(node.inputs, self.assignment.reads[node.name], strict=True)]
            self.ops.append(LOWERINGS[node.op](context, node, inputs, value))
        self.forms.setdefault((node.name, form), value)
        for wanted in sorted(self.assignment.wanted[node.name]):
            self._convert(node, wanted)

    def _input(self, node: Node, value: Value) -> None:
        """The input arrives channels first in float32."""
        first = self.input
        if len(node.shape) != 4:
            self.forms[node.name, FLOAT] = self.forms[node.name, FIRST] = first
            return
        self.forms[node.name, FIRST] = first
        if not self.assignment.wanted[node.name] & {FLOAT, *ROUNDED_FORMS}:
            return
        constants = scalars()
        if value.dtype != "float32":
            affine = self.affines[node.name, value.dtype]
            constants = scalars(multiplier=1 / float(affine.scale), **output_scalars(affine))
        key = OpKey("to_channels_last", (first.shape, value.shape), (first.dtype, value.dtype))
        self.ops.append(Op(node.name, key, (first.name,), value, constants))

    def _flatten(self, node: Node, value: Value) -> None:
        """(N, C, H, W) -> (N, C * H * W) in torch's order; free where H * W or C is one."""
        source = self.forms[node.inputs[0], self.assignment.reads[node.name][0]]
        logical = self.model.graph.by_name[node.inputs[0]].shape
        if len(logical) != 4 or logical[1] == 1 or logical[2] * logical[3] == 1:
            self.forms[node.name, self.assignment.produced[node.name]] = replace(source, shape=node.shape)
            return
        key = OpKey("to_channels_first", (source.shape, logical), (source.dtype, value.dtype))
        self.ops.append(Op(node.name, key, (source.name,), value))

    def _move(self, node: Node, context: Context) -> None:
        """Move a value in every form that is wanted; a view moves nothing."""
        wanted = self.assignment.wanted[node.name]
        for form in sorted({FLOAT if form == FIRST else form for form in wanted}):
            source = self.forms[node.inputs[0], form]
            made = replace(source, shape=physical(node.shape))
            if node.op == "gather":
                made = replace(made, name=f"{node.name}:{form}")
                self.ops.append(lower_gather(context, node, source, made))
            self.forms[node.name, form] = made
        for form in sorted(wanted):
            self._convert(node, form)

    def _convert(self, node: Node, form: str) -> None:
        """Make a form of a value exist, from the form its operation wrote where one step leads there."""
        if (node.name, form) in self.forms:
            return
        made = Value(
            f"{node.name}:{form}",
            node.shape if form == FIRST else physical(node.shape),
            _dtype(form),
        )
        if form == FIRST or (form == FLOAT and (node.name, FIRST) in self.forms):
            self._relayout(node, made, form)
            return
        produced = self.assignment.produced[node.name]
        if produced == FIRST:
            produced = FLOAT
            self._convert(node, FLOAT)
        source = self.forms[node.name, produced]
        kind, constants = self._conversion(node.name, produced, form)
        key = OpKey(kind, (source.shape, made.shape), (source.dtype, made.dtype))
        self.ops.append(Op(f"{node.name}.{kind}", key, (source.name,), made, constants))
        self.forms[node.name, form] = made

    def _conversion(self, name: str, source: str, form: str) -> tuple[str, dict[str, np.ndarray]]:
        """Kind and constants of the operation between two channels-last forms of a value."""
        target = output_scalars(self.affines[name, form]) if form != FLOAT else {}
        unit = float(self.affines[name, form].scale) if form != FLOAT else 1.0
        if source == FLOAT:
            return "quantize", scalars(multiplier=1 / unit, **target)
        given = self.affines[name, source]
        multiplier = np.float64(given.scale) / unit
        kind = "dequantize" if form == FLOAT else "requantize"
        return kind, scalars(a_zero_point=given.zero_point, a_multiplier=multiplier, **target)

    def _relayout(self, node: Node, made: Value, form: str) -> None:
        """Between channels-last and channels-first float32; free for values that are not images."""
        other = FLOAT if form == FIRST else FIRST
        self._convert(node, other)
        source = self.forms[node.name, other]
        if len(node.shape) != 4:
            self.forms[node.name, form] = source
            return
        kind = "to_channels_first" if form == FIRST else "to_channels_last"
        constants = {} if form == FIRST else scalars()
        key = OpKey(kind, (source.shape, made.shape), (source.dtype, made.dtype))
        self.ops.append(Op(f"{node.name}.{kind}", key, (source.name,), made, constants))
        self.forms[node.name, form] = made
