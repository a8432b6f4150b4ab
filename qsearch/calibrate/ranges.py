"""Activation ranges of a whole model from the statistics record, under one calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from qsearch.calibrate.global_scale import data_free_range
from qsearch.calibrate.histogram import TensorStatistics
from qsearch.calibrate.kl_divergence import kl_divergence_range
from qsearch.calibrate.mse import mse_range
from qsearch.calibrate.percentile import percentile_range
from qsearch.calibrate.record import StatisticsRecord
from qsearch.config import Calibration
from qsearch.errors import CalibrationError
from qsearch.models.graph import MOVES, Model, Node

__all__ = ["activation_ranges"]

Range = tuple[float, float]

# Exact on integers when input and output share scale and zero point.
_SHARED = ("max_pool2d", "flatten", *MOVES)
# Below the first, nothing was observed; the second then stands in. Its scale is small, yet not so small that
# the multipliers of the layer before, relative to it, leave the range of int32.
_DEAD_SPAN = 1e-9
_DEAD_END = 2.0**-10


def activation_ranges(
    record: StatisticsRecord | None,
    model: Model,
    calibration: Calibration,
    input_range: Range,
    own: Mapping[str, Calibration] = MappingProxyType({}),
) -> dict[str, Range]:
    """Derive the range of every value.

    Args:
        record: Statistics of the model; mode global_scale does without.
        model: The model.
        calibration: Mode and its parameters.
        input_range: (low, high) that preprocessed images can have; mode global_scale takes it as it is, the
            others never exceed it.
        own: Node name -> the calibration of its value, where that is another.

    Returns:
        Node name -> (low, high) with low <= 0 <= high and low < high, within the node's clip.

    Raises:
        CalibrationError: The mode needs a record and there is none, or it lacks a node.
    """
    ranges: dict[str, Range] = {}
    for node in model.graph.nodes:
        inputs = [ranges[name] for name in node.inputs]
        if node.op in _SHARED:
            ranges[node.name] = inputs[0]
            continue
        chosen = own.get(node.name, calibration)
        if (rule := _rule(chosen)) is None:
            raw = data_free_range(node, inputs, model.parameters, input_range, chosen.global_scale)
        else:
            raw = rule(_statistics(record, node, chosen.mode))
        ranges[node.name] = _usable(raw, input_range if node.op == "input" else node.clip)
    return ranges


def _rule(calibration: Calibration) -> Callable[[TensorStatistics], Range] | None:
    """The function from a tensor's statistics to its range; None for the mode without statistics."""
    rules: dict[str, Callable[[TensorStatistics], Range] | None] = {
        "max": _max_range,
        "percentile": lambda statistics: percentile_range(statistics, calibration.percentile),
        "kl_divergence": kl_divergence_range,
        "mse": mse_range,
        "global_scale": None,
    }
    return rules[calibration.mode]


def _max_range(statistics: TensorStatistics) -> Range:
    return statistics.minimum, statistics.maximum


def _statistics(record: StatisticsRecord | None, node: Node, mode: str) -> TensorStatistics:
    if record is None:
        raise CalibrationError(f"calibration mode {mode} needs recorded statistics; give images, or use mode global_scale")
    try:
        return record.tensors[node.name]
    except KeyError:
        raise CalibrationError(
            f"the statistics record knows nothing of node {node.name!r}: it was made with another model; observe this one"
        ) from None


def _usable(raw: Range, clip: Range | None) -> Range:
    """Cut a range to its clip, include zero, and widen it if it holds nothing else."""
    least, most = clip or (-float("inf"), float("inf"))
    low, high = (min(max(end, least), most) for end in raw)
    # Adding 0.0 turns a negative zero into zero.
    low, high = min(low, 0.0) + 0.0, max(high, 0.0) + 0.0
    if high - low > _DEAD_SPAN:
        return low, high
    if most > 0.0:
        return 0.0, min(most, _DEAD_END)
    return max(least, -_DEAD_END), 0.0
