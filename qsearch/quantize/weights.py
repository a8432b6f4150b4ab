"""Weight preparation: symmetric int8 weights and their scales."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qsearch.config import Granularity, WeightScale
from qsearch.qtype import INT8, IntRange

__all__ = ["QuantizedWeight", "WeightStore", "quantize_weight", "weight_scales"]

# The scale of a channel whose weights are all zero; any positive number represents zero exactly.
DEAD_SCALE = np.float32(1.0)


@dataclass(frozen=True)
class QuantizedWeight:
    """A layer's integer weights.

    Attributes:
        values: int8 (O, kh, kw, I/groups).
        scale: float32 (O,).
    """

    values: np.ndarray
    scale: np.ndarray


def weight_scales(weight: np.ndarray, limits: IntRange, granularity: Granularity, rule: WeightScale) -> np.ndarray:
    """Scales of symmetric weights.

    Args:
        weight: float32 (O, I/groups, kh, kw).
        limits: Integer range of the weights.
        granularity: One scale per output channel or one for the layer.
        rule: 'max' represents the largest magnitude exactly; 'power_of_two' rounds that scale up to a power of two.

    Returns:
        float32 (O,).
    """
    largest = np.abs(weight).reshape(len(weight), -1).max(1)
    if granularity == "layer_wise":
        largest = np.full_like(largest, largest.max())
    scale = (largest / limits.qmax).astype(np.float32)
    scale = np.where(scale < np.finfo(np.float32).tiny, DEAD_SCALE, scale)
    if rule == "power_of_two":
        scale = np.exp2(np.ceil(np.log2(scale.astype(np.float64)))).astype(np.float32)
    return scale


def quantize_weight(weight: np.ndarray, scale: np.ndarray, limits: IntRange) -> QuantizedWeight:
    """Round weights to the nearest integers.

    Args:
        weight: float32 (O, I/groups, kh, kw).
        scale: float32 (O,).
        limits: Integer range of the weights.
    """
    whole = np.rint(weight / scale[:, None, None, None])
    values = np.clip(whole, limits.qmin, limits.qmax).astype(limits.dtype)
    return QuantizedWeight(np.ascontiguousarray(values.transpose(0, 2, 3, 1)), scale)


class WeightStore:
    """Prepared weights by layer and rule, computed once and shared between trials.

    Repeated calls return the same array objects, so that whatever is derived from them can be kept too.
    """

    def __init__(self) -> None:
        self._prepared: dict[tuple[str, str, str], QuantizedWeight] = {}
        self._floats: dict[str, np.ndarray] = {}

    def quantized(self, name: str, weight: np.ndarray, granularity: Granularity, rule: WeightScale) -> QuantizedWeight:
        """Integer weights of a layer."""
        key = (name, granularity, rule)
        if key not in self._prepared:
            limits = INT8.weight
            self._prepared[key] = quantize_weight(weight, weight_scales(weight, limits, granularity, rule), limits)
        return self._prepared[key]

    def floats(self, name: str, weight: np.ndarray) -> np.ndarray:
        """float32 weights of a layer as (O, kh, kw, I/groups)."""
        if name not in self._floats:
            self._floats[name] = np.ascontiguousarray(weight.transpose(0, 2, 3, 1))
        return self._floats[name]
