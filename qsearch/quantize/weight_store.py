"""Prepared weights of a model's layers, kept from trial to trial."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qsearch.config import Granularity, WeightSettings
from qsearch.errors import QuantizeError
from qsearch.qtype import INT8, INT16, W4A8, IntRange
from qsearch.quantize.group_scales import GroupForm, group_weights
from qsearch.quantize.kept_weights import KeptWeights
from qsearch.quantize.rounding.learned import RoundedLayer
from qsearch.quantize.rounding.learned_network import LearnRequest
from qsearch.quantize.rounding.rounded_weights import RoundedWeights, WeightGrid
from qsearch.quantize.weights import (
    BIAS_ROOM,
    MAX_ACCUMULATOR,
    AccumulatorBound,
    QuantizedWeight,
    activation_limit,
    fit_weight,
    half_weight,
    quantize_weight,
    rounded_to_tf32,
    weight_scales,
)

__all__ = ["GROUP", "WeightStore"]

# Input channels of a group of 4-bit weights. Smaller ones cost more bytes: 4 bits per group beside 4 per weight.
GROUP = 32


class WeightStore:
    """Prepared weights by layer and rule, computed once and shared between trials as far as they are kept.

    Repeated calls return the same array objects, so that whatever is derived from them can be kept as long.

    Args:
        rounded: Where roundings come from that images decide; None without images.
        kept: Where prepared weights are kept; None for a place of its own.
    """

    def __init__(self, rounded: RoundedWeights | None = None, kept: KeptWeights | None = None) -> None:
        self._rounded, self._kept = rounded, kept or KeptWeights()
        self._limits: dict[str, int] = {}

    def quantized(
        self, name: str, weight: np.ndarray, settings: WeightSettings, limits: IntRange = INT8.weight
    ) -> QuantizedWeight:
        """Integer or float8 weights of a layer that reads 8-bit activations.

        float8 ones are always rounded to the nearest. Groups and asymmetric weights are 4-bit layers' alone; others are
        symmetric, with a scale per channel for groups.
        """
        if settings.rounding != "nearest" and limits.is_integer:
            return self._of_rounded(name, settings, limits)
        return self._once(lambda: _nearest(weight, settings, limits), "quantized", name, settings, limits.qmax)

    def learned(self, request: LearnRequest) -> dict[str, RoundedLayer]:
        """Learn what a configuration asks for, see `learn_network`.

        Raises:
            QuantizeError: There are no images.
        """
        if self._rounded is None:
            raise QuantizeError("learned rounding needs calibration images, and none are at hand")
        return self._rounded.learned(request)

    def _of_rounded(self, name: str, settings: WeightSettings, limits: IntRange) -> QuantizedWeight:
        """Weights whose rounding images decided; learned ones start from those of second order."""
        if self._rounded is None:
            raise QuantizeError(f"layer {name!r}: {settings.rounding} rounding needs calibration images, and none are at hand")
        granularity: Granularity = "layer_wise" if settings.granularity == "layer_wise" else "channel_wise"
        form = _form(settings, limits)
        return self._rounded.quantized(name, WeightGrid(limits, granularity, settings.weight_scale == "power_of_two", form))

    def bounded(self, name: str, weight: np.ndarray, settings: WeightSettings, largest: int) -> QuantizedWeight:
        """int16 weights of a layer that reads activations up to `largest`, with `BIAS_ROOM` left for its bias."""

        def fitted() -> QuantizedWeight:
            bound = AccumulatorBound(largest, MAX_ACCUMULATOR - BIAS_ROOM)
            magnitude = np.abs(weight).reshape(len(weight), -1)
            least = magnitude.sum(1, dtype=np.float64) * largest / bound.limit
            start = np.maximum(magnitude.max(1) / INT16.weight.qmax, least).astype(np.float32)
            return fit_weight(name, weight, start, settings, bound)

        return self._once(fitted, "bounded", name, settings, largest)

    def activation_limit(self, name: str, weight: np.ndarray) -> int:
        """`activation_limit` of a layer."""
        if name not in self._limits:
            self._limits[name] = activation_limit(weight)
        return self._limits[name]

    def floats(self, name: str, weight: np.ndarray, precision: str = "fp32") -> np.ndarray:
        """float32, tf32 or float16 weights of a layer as (O, kh, kw, I/groups).

        Raises:
            QuantizeError: One of them is beyond float16.
        """

        def rounded() -> np.ndarray:
            if precision == "fp16":
                kept = half_weight(name, weight)
            else:
                kept = rounded_to_tf32(weight) if precision == "tf32" else weight
            return np.ascontiguousarray(kept.transpose(0, 2, 3, 1))

        return self._once(rounded, "float", name, precision)

    def _once(self, make: Callable[[], Any], *key: Any) -> Any:
        """What is kept under a key, or else is made now."""
        if (found := self._kept.get((self, *key))) is None:
            found = make()
            self._kept.put((self, *key), found, found.nbytes if isinstance(found, np.ndarray) else found.bytes)
        return found


def _form(settings: WeightSettings, limits: IntRange) -> GroupForm | None:
    """Groups and offsets, which 4-bit weights alone have."""
    size = GROUP if settings.granularity == "group_wise" else 0
    # Offsets would go with a scale of every channel.
    offsets = settings.weight_symmetry == "asymmetric" and settings.granularity != "layer_wise"
    if limits != W4A8.weight or not (size or offsets):
        return None
    return GroupForm(size, offsets, settings.weight_scale == "mse" or settings.rounding != "nearest")


def _nearest(weight: np.ndarray, settings: WeightSettings, limits: IntRange) -> QuantizedWeight:
    granularity = "channel_wise" if settings.granularity == "group_wise" else settings.granularity
    scale, form = weight_scales(weight, limits, granularity, settings.weight_scale), _form(settings, limits)
    return quantize_weight(weight, scale, limits) if form is None else group_weights(weight, scale, form)
