"""Lower a layer graph under one configuration to an integer program.

The forms of all values are assigned first (`assign`); then every node is written once, with the conversions
its readers need. What a node's operation computes is defined in `qsearch.quantize.program`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from qsearch.config import QuantConfig
from qsearch.models.graph import MOVES, Model, Node
from qsearch.quantize.affine import Affine, affine_from_range
from qsearch.quantize.assign import FIRST, FLOAT, UINT8_FORM, Assignment, assign_forms
from qsearch.quantize.lower_attention import ATTENTION_LOWERINGS, lower_gather
from qsearch.quantize.lower_nodes import NODE_LOWERINGS, Context, scalars
from qsearch.quantize.program import Op, OpKey, Program, Value
from qsearch.quantize.weights import WeightStore

__all__ = ["lower", "precisions"]

Ranges = dict[str, tuple[float, float]]
LOWERINGS = NODE_LOWERINGS | ATTENTION_LOWERINGS


def precisions(model: Model, config: QuantConfig) -> dict[str, str]:
    """Every layer's precision under a configuration.

    Raises:
        SpaceError: The configuration names a layer that the model does not have.
    """
    return config.resolve(model.graph.convolutions, model.graph.dense)


def lower(model: Model, config: QuantConfig, ranges: Ranges, weights: WeightStore) -> Program:
    """Lower a model.

    Args:
        model: The model.
        config: Precisions, granularity and weight scales; its calibration is already in `ranges`.
        ranges: Node name -> (low, high) of its value, for every node.
        weights: Prepared weights, shared between trials.

    Returns:
        The program; its input is float32 (N, C, H, W), its output float32 (N, classes).

    Raises:
        QuantizeError: A tensor or layer cannot be represented.
        SpaceError: The configuration names a layer that the model does not have.
    """
    chosen = precisions(model, config)
    assignment = assign_forms(model.graph, chosen)
    writer = _Writer(model, assignment, _affines(model, assignment, ranges))
    for node in model.graph.nodes:
        context = Context(model, config, chosen, assignment, writer.affines, weights)
        writer.write(node, context)
    output = writer.forms[model.graph.output, FLOAT]
    return Program(writer.input, tuple(writer.ops), output)


def _affines(model: Model, assignment: Assignment, ranges: Ranges) -> dict[str, Affine]:
    """Scale and zero point of every value that exists as uint8."""
    affines: dict[str, Affine] = {}
    for node in model.graph.nodes:
        if UINT8_FORM not in assignment.wanted[node.name] and node.name not in assignment.integer:
            continue
        if node.op in MOVES or (node.op in ("max_pool2d", "flatten") and node.name in assignment.integer):
            affines[node.name] = affines[node.inputs[0]]
        else:
            affines[node.name] = affine_from_range(node.name, *ranges[node.name])
    return affines


def physical(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Channels-last shape of a logical shape."""
    return (shape[0], shape[2], shape[3], shape[1]) if len(shape) == 4 else shape


@dataclass
class _Writer:
    """The program while it is being written."""

    model: Model
    assignment: Assignment
    affines: dict[str, Affine]
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
        value = Value(f"{node.name}:{form}", shape, "uint8" if form == UINT8_FORM else "float32")
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
        if not self.assignment.wanted[node.name] & {FLOAT, UINT8_FORM}:
            return
        constants = scalars()
        if value.dtype == "uint8":
            affine = self.affines[node.name]
            constants = scalars(zero_point=affine.zero_point, multiplier=1 / float(affine.scale))
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
        """Make a form of a value exist, by way of channels-last float32 where it must."""
        if (node.name, form) in self.forms:
            return
        made = Value(
            f"{node.name}:{form}",
            node.shape if form == FIRST else physical(node.shape),
            "uint8" if form == UINT8_FORM else "float32",
        )
        if form == FIRST or (form == FLOAT and (node.name, FIRST) in self.forms):
            self._relayout(node, made, form)
            return
        if form == UINT8_FORM:
            self._convert(node, FLOAT)
        source = self.forms[node.name, FLOAT if form == UINT8_FORM else UINT8_FORM]
        affine = self.affines[node.name]
        if form == UINT8_FORM:
            kind, constants = "quantize", scalars(zero_point=affine.zero_point, multiplier=1 / float(affine.scale))
        else:
            kind, constants = "dequantize", scalars(a_zero_point=affine.zero_point, a_multiplier=float(affine.scale))
        key = OpKey(kind, (source.shape, made.shape), (source.dtype, made.dtype))
        self.ops.append(Op(f"{node.name}.{kind}", key, (source.name,), made, constants))
        self.forms[node.name, form] = made

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
