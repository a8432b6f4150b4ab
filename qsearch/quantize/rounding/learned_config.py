"""Learned rounding of a configuration: what to start from, what is rounded where, and which layers are learned."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qsearch.config import QuantConfig
from qsearch.errors import QuantizeError
from qsearch.models.graph import Model
from qsearch.qtype import PRECISIONS
from qsearch.quantize.assign import UINT8_FORM, assign_forms
from qsearch.quantize.bias_correction import mean_error
from qsearch.quantize.perturbation import rounded_reads
from qsearch.quantize.rounding.learned import LEARNED, RoundedLayer
from qsearch.quantize.rounding.learned_network import LearnRequest
from qsearch.quantize.weight_store import WeightStore

__all__ = ["learned_layers"]


def learned_layers(
    model: Model,
    config: QuantConfig,
    ranges: dict[str, tuple[float, float]],
    weights: WeightStore,
    means: Mapping[str, np.ndarray],
) -> dict[str, RoundedLayer]:
    """Learn the layers of a configuration that ask for it; what was learned before is found on disk.

    Layers of 8-bit activations that are rounded otherwise keep their integers, and only their biases follow. 16-bit layers
    count as float, and so do fp8 layers and float16 and float8 values.

    Args:
        model: The model.
        config: The configuration.
        ranges: Node name -> (low, high) of its value, for every node.
        weights: Prepared weights.
        means: Layer name -> mean of what its kernel reads, float64 (I, kh, kw); measured ones.

    Returns:
        Layer name -> its rounding; empty if no layer asks for it.

    Raises:
        QuantizeError: A layer has groups or offsets, there are no images or too few, or a block is not finite.
        StudyError: A result cannot be written.
    """
    layers = config.resolve(model.graph.layer_types)
    eight = {name: one for name, one in layers.items() if PRECISIONS[one.precision].activation.dtype == UINT8_FORM}
    wanted = [name for name, one in eight.items() if one.weights.rounding in LEARNED]
    if not wanted:
        return {}
    start, limits = {}, {}
    for name, one in eight.items():
        weight, range_ = model.parameters.weight[name], PRECISIONS[one.precision].weight
        prepared = weights.quantized(name, weight, one.weights, range_)
        start[name] = RoundedLayer(prepared, mean_error(weight, prepared, means[name]).astype(np.float32))
        if name in wanted:
            if prepared.tables:
                raise QuantizeError(
                    f"layer {name!r}: learned rounding knows neither groups nor asymmetric weights; use granularity channel_wise "
                    "or layer_wise and symmetric weights, or rounding second_order"
                )
            limits[name] = range_
    assignment = assign_forms(model.graph, {name: one.precision for name, one in layers.items()})
    reads = rounded_reads(model, assignment, ranges, weights, config.activations)
    roundings = {edge: tuple(one for one in found if one.limits.is_integer) for edge, found in reads.items()}
    alone = frozenset(name for name in wanted if eight[name].weights.rounding == "learned_layer")
    return weights.learned(LearnRequest(model, start, limits, roundings, alone))
