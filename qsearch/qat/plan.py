"""What a configuration rounds, and which steps there are to learn.

The rounding points are those of the compiled module, see `qsearch.quantize.perturbation`. A value has one step to learn,
and so have values that the module holds with one scale: what is moved or pooled without computing, and what a
concatenation copies. Zero points stay those of calibration: they are integers, and the bytes that are zero stay zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qsearch.config import Granularity, LayerSettings, QuantConfig
from qsearch.errors import SpaceError
from qsearch.models.graph import MOVES, Graph, Model
from qsearch.qtype import PRECISIONS, IntRange
from qsearch.quantize.affine import Affine
from qsearch.quantize.assign import INT16_FORM, INTEGER_FORMS, SHARED, UINT8_FORM, assign_forms
from qsearch.quantize.lower import value_affines
from qsearch.quantize.perturbation import Edge, quantized_reads
from qsearch.quantize.weight_store import WeightStore
from qsearch.quantize.weights import weight_scales

__all__ = ["QatPlan", "Ranges", "ValueQuantizer", "WeightQuantizer", "plan_finetuning", "require_trainable"]

Ranges = dict[str, tuple[float, float]]

KNOWN = ("fp32", "int16", "int8", "w4a8")


@dataclass(frozen=True)
class ValueQuantizer:
    """What rounds a form of a value.

    Attributes:
        root: The node whose step is learned for it.
        ratio: Its step over that of the root.
        zero_point: The integer that stands for zero.
        limits: Its integers.
    """

    root: str
    ratio: float
    zero_point: int
    limits: IntRange

    @property
    def low(self) -> int:
        """Least integer, counted from the zero point."""
        return self.limits.qmin - self.zero_point

    @property
    def high(self) -> int:
        """Largest integer, counted from the zero point."""
        return self.limits.qmax - self.zero_point


@dataclass(frozen=True, eq=False)
class WeightQuantizer:
    """What rounds a layer's weights.

    Attributes:
        scale: Where the step starts, float32 (O, 1, 1, 1), or (1, 1, 1, 1) for one per layer.
        limits: The integers.
        learned: Whether it is learned; powers of two are not.
        reads: What rounds the layer's input, in whose steps the bias is rounded.
    """

    scale: np.ndarray
    limits: IntRange
    learned: bool
    reads: ValueQuantizer


@dataclass(frozen=True, eq=False)
class QatPlan:
    """A configuration of a model, to be trained.

    Attributes:
        model: The float model that training starts from.
        config: The configuration.
        ranges: Node name -> (low, high) of its value at the start.
        values: (Node name, form) -> what rounds it.
        steps: Root -> its step at the start.
        reads: Edge -> what rounds the value read, one after the other.
        weights: Layer name -> what rounds its weights; of layers with 8-bit activations. Others' weights are trained as they
            are: 16 bits move none of them visibly.
    """

    model: Model
    config: QuantConfig
    ranges: Ranges
    values: Mapping[tuple[str, str], ValueQuantizer]
    steps: Mapping[str, np.float32]
    reads: Mapping[Edge, tuple[ValueQuantizer, ...]]
    weights: Mapping[str, WeightQuantizer]

    def trained_ranges(self, steps: Mapping[str, np.float32]) -> Ranges:
        """The ranges that lowering makes the scales of learned steps from, exactly.

        Args:
            steps: Root -> its step.

        Returns:
            Node name -> (low, high), for every node; as at the start where a value stays in float.
        """
        found = dict(self.ranges)
        for name in found:
            # Of two forms the coarser has the say: the other's step follows from the same range.
            one = next((self.values[name, form] for form in INTEGER_FORMS if (name, form) in self.values), None)
            if one is None or one.root not in steps:
                continue
            step = float(np.float32(steps[one.root] * np.float32(one.ratio)))
            low, high = one.low, one.high
            if self.config.activations == "symmetric" and low == -high - 1:
                # Of a symmetric range lowering leaves the lowest of the 256 integers out of the account.
                low = -high
            found[name] = (low * step, high * step)
        return found


def plan_finetuning(model: Model, config: QuantConfig, ranges: Ranges, weights: WeightStore) -> QatPlan:
    """Work out what a configuration rounds.

    Args:
        model: What the configuration's methods make of the model.
        config: The configuration.
        ranges: Node name -> (low, high) of its value, for every node.
        weights: Prepared weights, whose sums bound 16-bit integers.

    Raises:
        SpaceError: Nothing is quantized, or something is that has no gradients here; the layer is named.
        QuantizeError: A tensor cannot be represented.
    """
    layers = config.resolve(model.graph.layer_types)
    require_trainable(config, model.graph)
    assignment = assign_forms(model.graph, {name: one.precision for name, one in layers.items()})
    affines = value_affines(model, assignment, ranges, weights, config.activations)
    roots = _roots(model.graph, affines)
    steps: dict[str, np.float32] = {}
    values = {}
    for (name, form), affine in affines.items():
        start = steps.setdefault(roots[name], affine.scale)
        values[name, form] = ValueQuantizer(roots[name], float(affine.scale) / float(start), affine.zero_point, affine.limits)
    reads = quantized_reads(model.graph, assignment, values)
    quantized = {}
    for name, one in layers.items():
        if PRECISIONS[one.precision].activation.dtype == UINT8_FORM:
            read = values[model.graph.by_name[name].inputs[0], assignment.reads[name][0]]
            quantized[name] = _weight_quantizer(model.parameters.weight[name], one, read)
    # A value that is held in no rounded form has nothing to learn.
    used = {one.root for found in reads.values() for one in found} | {one.reads.root for one in quantized.values()}
    learned = {root: step for root, step in steps.items() if root in used}
    return QatPlan(model, config, ranges, values, learned, reads, quantized)


def require_trainable(config: QuantConfig, graph: Graph) -> None:
    """Refuse what fine-tuning cannot do.

    Args:
        config: The configuration.
        graph: The model's layers.

    Raises:
        SpaceError: Nothing is quantized, or something is that has no gradients here; the layer is named.
    """
    layers = config.resolve(graph.layer_types)
    for name, one in layers.items():
        if one.precision not in KNOWN:
            raise SpaceError(
                f"layer {name!r} is to be {one.precision}, and fine-tuning knows {', '.join(KNOWN)}: choose one of these for it"
            )
        four_bits = one.precision == "w4a8"
        if four_bits and one.weights.granularity == "group_wise":
            raise SpaceError(
                f"layer {name!r} has granularity group_wise, and fine-tuning learns no scales of groups: use channel_wise or "
                "layer_wise"
            )
        if four_bits and one.weights.weight_symmetry == "asymmetric" and one.weights.granularity != "layer_wise":
            raise SpaceError(
                f"layer {name!r} has asymmetric weights, and fine-tuning learns no offsets: use weight_symmetry symmetric"
            )
    if all(one.precision == "fp32" for one in layers.values()):
        raise SpaceError("the configuration keeps every layer in fp32: there is nothing to fine-tune, quantize some layer")


def _weight_quantizer(weight: np.ndarray, settings: LayerSettings, reads: ValueQuantizer) -> WeightQuantizer:
    limits, rule = PRECISIONS[settings.precision].weight, settings.weights.weight_scale
    fixed = rule == "power_of_two"
    granularity: Granularity = "layer_wise" if settings.weights.granularity == "layer_wise" else "channel_wise"
    # A step that is learned may start where the squared error is least, whatever rule the configuration has.
    scale = weight_scales(weight, limits, granularity, "power_of_two" if fixed else "mse").reshape(-1, 1, 1, 1)
    return WeightQuantizer(scale[:1] if granularity == "layer_wise" else scale, limits, not fixed, reads)


def _roots(graph: Graph, affines: Mapping[tuple[str, str], Affine]) -> dict[str, str]:
    """Node name -> the node whose step it shares."""
    parent = {node.name: node.name for node in graph.nodes}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for node in graph.nodes:
        if node.op in MOVES or node.op in SHARED:
            parent[root(node.name)] = root(node.inputs[0])
        elif node.op == "concat":
            for form in (UINT8_FORM, INT16_FORM):
                target = affines.get((node.name, form))
                for name in node.inputs:
                    # What it copies keeps its integers: both have one scale, and go on having one.
                    if target is not None and affines.get((name, form)) == target:
                        parent[root(name)] = root(node.name)
    return {name: root(name) for name in parent}
