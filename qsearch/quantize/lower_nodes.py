"""One function per graph operation: from a node and the forms of its values to an operation of the program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from qsearch.config import LayerSettings
from qsearch.errors import QuantizeError
from qsearch.models.graph import Model, Node
from qsearch.qtype import FP8, PRECISIONS, UNSCALED
from qsearch.quantize.affine import Affine
from qsearch.quantize.assign import Assignment, kernel_precision
from qsearch.quantize.bias_correction import mean_error
from qsearch.quantize.group_scales import coarsened
from qsearch.quantize.lookup import lookup_table
from qsearch.quantize.program import INTEGER_DTYPES, Op, OpKey, Value
from qsearch.quantize.rounding.learned import LEARNED, RoundedLayer
from qsearch.quantize.scalars import output_scalars, scalars
from qsearch.quantize.weight_store import WeightStore
from qsearch.quantize.weights import (
    MAX_ACCUMULATOR,
    AccumulatorBound,
    QuantizedWeight,
    fit_weight,
    quantize_weight,
)

__all__ = ["NODE_LOWERINGS", "Context", "scalars"]

# A bias beyond this would leave an int32 accumulator no room; its channel's weight scale is raised instead.
MAX_BIAS = 2**29


@dataclass(frozen=True)
class Context:
    """What lowering a node may need to know.

    Attributes:
        model: The model.
        config: The configuration.
        layers: Layer name -> settings.
        assignment: Forms of every value.
        affines: (node name, form) -> scale and zero point, for values that exist in other forms than float32.
        weights: Prepared weights.
        means: Layer name -> mean of what its kernel reads, float64 (I, kh, kw); biases are corrected where it is known.
        learned: Layer name -> its rounding, of layers that do not take theirs from `weights`.
    """

    model: Model
    layers: dict[str, LayerSettings]
    assignment: Assignment
    affines: dict[tuple[str, str], Affine]
    weights: WeightStore
    means: Mapping[str, np.ndarray]
    learned: Mapping[str, RoundedLayer]


def _output_scalars(context: Context, node: Node, output: Value) -> dict[str, float]:
    """Zero point and clip bounds of an integer output, or the real clip of a float one."""
    if output.dtype != "float32":
        return output_scalars(context.affines[node.name, output.dtype], node.clip)
    return {} if node.clip is None else {"low": node.clip[0], "high": node.clip[1]}


def _operand(context: Context, node: Node, index: int, value: Value, which: str, unit: float) -> dict[str, float]:
    """Zero point and multiplier that bring an operand into the output's unit."""
    if value.dtype != "float32":
        affine = context.affines[node.inputs[index], value.dtype]
        return {f"{which}_zero_point": affine.zero_point, f"{which}_multiplier": np.float64(affine.scale) / unit}
    return {f"{which}_multiplier": 1 / unit}


def _unit(context: Context, node: Node, output: Value) -> float:
    """Real size of one step of the output: its scale, or one for float32."""
    return float(context.affines[node.name, output.dtype].scale) if output.dtype != "float32" else 1.0


def _clipped(node: Node, output: Value) -> bool:
    return node.clip is not None and output.dtype not in INTEGER_DTYPES


def _layer(context: Context, node: Node, inputs: list[Value], output: Value) -> Op:
    shapes = [value.shape for value in (*inputs, output)]
    if node.op == "linear":
        shapes = [(int(np.prod(shape[:-1])), 1, 1, shape[-1]) for shape in shapes]
    precision = kernel_precision(context.layers[node.name].precision, context.model.graph.layer_types[node.name])
    dtypes = tuple(value.dtype for value in (*inputs, output))
    key = OpKey("conv2d", tuple(shapes), dtypes, precision, node.conv, residual=node.residual, clipped=_clipped(node, output))
    values = _output_scalars(context, node, output)
    unit = _unit(context, node, output)
    if precision in UNSCALED:
        if node.residual:
            values |= _operand(context, node, 1, inputs[1], "b", 1.0)
        constants = {
            "weight": context.weights.floats(node.name, context.model.parameters.weight[node.name], precision),
            "bias": context.model.parameters.bias[node.name],
        }
        constants |= scalars(multiplier=1 / unit, **values)
    else:
        if node.residual:
            values |= _operand(context, node, 1, inputs[1], "b", unit)
        affine = context.affines[node.inputs[0], inputs[0].dtype]
        if precision == "fp8":
            constants = _float8_layer(context, node, affine, unit)
        else:
            prepared = _integer_weight(context, node.name, affine)
            key = replace(key, weight_group=prepared.group, weight_offset=prepared.group_offset is not None)
            constants = _integer_layer(context, node, prepared, affine, unit)
        constants |= scalars(a_zero_point=affine.zero_point, **values)
    if node.clip_high is not None:
        constants["clip_high"] = _clip_high(context, node, output)
        key = replace(key, clips_channels=True)
    return Op(node.name, key, tuple(value.name for value in inputs), output, constants)


def _clip_high(context: Context, node: Node, output: Value) -> np.ndarray:
    """High end of every output channel's clip in the unit of the output, float32 (O,); whole steps for integers."""
    high = context.model.parameters.constants[node.clip_high or ""]
    if output.dtype not in INTEGER_DTYPES:
        return (high / np.float64(_unit(context, node, output))).astype(np.float32)
    affine = context.affines[node.name, output.dtype]
    whole = np.rint(high / np.float64(affine.scale)) + affine.zero_point
    return (np.clip(whole, affine.limits.qmin, affine.limits.qmax) - affine.zero_point).astype(np.float32)


def _float8_layer(context: Context, node: Node, affine: Affine, unit: float) -> dict[str, np.ndarray]:
    """Weight, bias and multiplier of an fp8 layer, the bias in the unit of the output."""
    settings, parameters = context.layers[node.name].weights, context.model.parameters
    prepared = context.weights.quantized(node.name, parameters.weight[node.name], settings, FP8.weight)
    multiplier = prepared.scale.astype(np.float64) * np.float64(affine.scale) / unit
    bias = parameters.bias[node.name].astype(np.float64) / unit
    constants = {"weight": prepared.values, "bias": bias.astype(np.float32), "multiplier": multiplier.astype(np.float32)}
    return constants | {"weight_scale": prepared.scale}


def _integer_weight(context: Context, name: str, affine: Affine) -> QuantizedWeight:
    """Integer weights of a layer, with which its bias fits the accumulator."""
    prepare = _bounded_weight if context.layers[name].precision == "int16" else _prepared_weight
    return prepare(context, name, affine, context.model.parameters.bias[name].astype(np.float64))


def _integer_layer(context: Context, node: Node, prepared: QuantizedWeight, affine: Affine, unit: float) -> dict[str, np.ndarray]:
    """Weight, bias and multiplier of an integer layer.

    The input's zero point is folded into the bias: sum (a - z) w = sum a w - z sum w.
    """
    name, bias = node.name, context.model.parameters.bias[node.name].astype(np.float64)
    if name in context.learned:
        bias = bias + context.learned[name].shift
    elif name in context.means and context.layers[name].precision != "int16":
        bias = bias + mean_error(context.model.parameters.weight[name], prepared, context.means[name])
    scale = prepared.scale.astype(np.float64) * np.float64(affine.scale)
    corrected = np.rint(bias / scale) - affine.zero_point * prepared.sums
    reach = prepared.magnitudes * affine.limits.qmax + np.abs(corrected)
    if reach.max() > MAX_ACCUMULATOR:
        raise QuantizeError(
            f"layer {name!r} can overflow its int32 accumulator (reach {int(reach.max())}): keep it in fp32 with --skip or `skip`"
        )
    multiplier = (scale / unit).astype(np.float32)
    constants = {"weight": prepared.values, "bias": corrected.astype(np.int32), "multiplier": multiplier}
    return constants | {"weight_scale": prepared.scale} | prepared.tables


def _prepared_weight(context: Context, name: str, affine: Affine, bias: np.ndarray) -> QuantizedWeight:
    """Integer weights; a channel whose weights are tiny beside its bias gets a scale that its bias fits."""
    weight = context.model.parameters.weight[name]
    limits = PRECISIONS[context.layers[name].precision].weight
    if name in context.learned:
        prepared = context.learned[name].weight
    elif context.layers[name].weights.rounding in LEARNED:
        raise QuantizeError(f"layer {name!r} is to be rounded as learned, and nothing was learned; see `learned_layers`")
    else:
        prepared = context.weights.quantized(name, weight, context.layers[name].weights, limits)
    least = np.abs(bias) / (np.float64(affine.scale) * MAX_BIAS)
    if (prepared.scale >= least).all():
        return prepared
    if prepared.tables:
        return coarsened(weight, prepared, least.astype(np.float32))
    # The other channels keep their integers, which need not be the nearest.
    raised = quantize_weight(weight, np.maximum(prepared.scale, least.astype(np.float32)), limits)
    low = (prepared.scale < raised.scale)[:, None, None, None]
    return QuantizedWeight(np.where(low, raised.values, prepared.values), raised.scale)


def _bounded_weight(context: Context, name: str, affine: Affine, bias: np.ndarray) -> QuantizedWeight:
    """int16 weights with which no sum overflows, bias included."""
    weight, settings = context.model.parameters.weight[name], context.layers[name].weights
    prepared = context.weights.bounded(name, weight, settings, affine.limits.qmax)
    bound = AccumulatorBound(affine.limits.qmax, MAX_ACCUMULATOR, bias, affine.scale)
    if (bound.reach(prepared) <= bound.limit).all():
        return prepared
    return fit_weight(name, weight, prepared.scale, settings, bound)


def _add(context: Context, node: Node, inputs: list[Value], output: Value) -> Op:
    unit = _unit(context, node, output)
    values = _output_scalars(context, node, output)
    for i, which in enumerate("ab"):
        values |= _operand(context, node, i, inputs[i], which, unit)
    return _plain(node, "add", inputs, output, scalars(**values))


def _mul(context: Context, node: Node, inputs: list[Value], output: Value) -> Op:
    values = _output_scalars(context, node, output)
    multiplier = 1 / _unit(context, node, output)
    for i, which in enumerate("ab"):
        if inputs[i].dtype != "float32":
            affine = context.affines[node.inputs[i], inputs[i].dtype]
            values[f"{which}_zero_point"] = affine.zero_point
            multiplier *= float(affine.scale)
    return _plain(node, "mul", inputs, output, scalars(multiplier=multiplier, **values))


def _avg_pool2d(context: Context, node: Node, inputs: list[Value], output: Value) -> Op:
    values = _output_scalars(context, node, output)
    multiplier = 1 / _unit(context, node, output)
    if inputs[0].dtype in INTEGER_DTYPES:
        affine = context.affines[node.inputs[0], inputs[0].dtype]
        values["a_zero_point"] = affine.zero_point
        multiplier *= float(affine.scale) / float(np.prod(node.pool.kernel))
    return _plain(node, "avg_pool2d", inputs, output, scalars(multiplier=multiplier, **values))


def _max_pool2d(context: Context, node: Node, inputs: list[Value], output: Value) -> Op:
    return _plain(node, "max_pool2d", inputs, output, scalars())


def _activation(context: Context, node: Node, inputs: list[Value], output: Value) -> Op:
    if inputs[0].dtype != "uint8":
        values = _output_scalars(context, node, output) | _operand(context, node, 0, inputs[0], "a", 1.0)
        return _plain(node, "activation", inputs, output, scalars(multiplier=1 / _unit(context, node, output), **values))
    given, made = context.affines[node.inputs[0], "uint8"], context.affines[node.name, "uint8"]
    table = lookup_table(node.activation or "", node.clip, given, made)
    return _plain(node, "lookup", inputs, output, {"table": table})


def _concat(context: Context, node: Node, inputs: list[Value], output: Value) -> Op:
    count = len(inputs)
    constants = {"multipliers": np.ones(count, np.float32), "zero_points": np.zeros(count, np.int32)}
    copies = [True] * count
    values: dict[str, float] = {}
    if output.dtype != "float32":
        target = context.affines[node.name, output.dtype]
        values = output_scalars(target)
        for i, name in enumerate(node.inputs):
            affine = context.affines[name, output.dtype]
            copies[i] = affine == target
            constants["multipliers"][i] = np.float64(affine.scale) / np.float64(target.scale)
            constants["zero_points"][i] = affine.zero_point
    return _plain(node, "concat", inputs, output, constants | scalars(**values), copies=tuple(copies))


def _foreign(context: Context, node: Node, inputs: list[Value], output: Value) -> Op:
    assert node.foreign is not None
    names = node.foreign.parameters
    return _plain(node, "foreign", inputs, output, {name: context.model.parameters.constants[name] for name in names})


def _plain(
    node: Node, kind: str, inputs: list[Value], output: Value, constants: dict[str, np.ndarray], copies: tuple[bool, ...] = ()
) -> Op:
    """An operation whose key follows from its values."""
    shapes = tuple(value.shape for value in (*inputs, output))
    dtypes = tuple(value.dtype for value in (*inputs, output))
    function = node.activation if kind == "activation" else None
    key = OpKey(
        kind,
        shapes,
        dtypes,
        pool=node.pool,
        clipped=_clipped(node, output),
        function=function,
        copies=copies,
        channels=node.channels,
        foreign=node.foreign,
    )
    return Op(node.name, key, tuple(value.name for value in inputs), output, constants)


NODE_LOWERINGS: dict[str, Callable[[Context, Node, list[Value], Value], Op]] = {
    "conv2d": _layer,
    "linear": _layer,
    "add": _add,
    "mul": _mul,
    "avg_pool2d": _avg_pool2d,
    "max_pool2d": _max_pool2d,
    "activation": _activation,
    "concat": _concat,
    "foreign": _foreign,
}
