"""Affine quantization: real = scale * (integer - zero_point).

Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
2018. 8-bit activations use the unsigned range and an integer zero point, so that zero is exact; 16-bit ones
are symmetric around a zero point of zero. A float8 tensor has a scale, and the numbers of
its type take the integers' place; a float16 tensor counts as one of scale one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qsearch.config import Symmetry
from qsearch.errors import QuantizeError
from qsearch.qtype import FLOAT8, FLOAT16, UINT8, IntRange

__all__ = ["HALF", "Affine", "affine_from_range", "dequantize", "float8_from_range", "quantize", "symmetric_from_range"]


@dataclass(frozen=True)
class Affine:
    """Scale and zero point of an integer tensor.

    Attributes:
        scale: Real distance of neighbouring integers, float32.
        zero_point: The integer that stands for zero, within `limits`.
        limits: The tensor's integers.
    """

    scale: np.float32
    zero_point: int
    limits: IntRange = UINT8

    def clip_bounds(self, clip: tuple[float, float] | None) -> tuple[int, int]:
        """The integers that a real clip (low, high) maps to, within the tensor's limits."""
        qmin, qmax = self.limits.qmin, self.limits.qmax
        if clip is None:
            return qmin, qmax
        low, high = (np.rint(np.float64(bound) / np.float64(self.scale)) + self.zero_point for bound in clip)
        return int(np.clip(low, qmin, qmax)), int(np.clip(high, qmin, qmax))


HALF = Affine(np.float32(1), 0, FLOAT16)


def affine_from_range(name: str, low: float, high: float, symmetry: Symmetry = "asymmetric") -> Affine:
    """Spread [low, high], widened to contain zero, over the 256 integers of uint8.

    Args:
        name: Tensor name, for the message.
        low: Smallest real value.
        high: Largest real value.
        symmetry: 'symmetric' widens a range with negative values to [-m, m], zero at 128.

    Raises:
        QuantizeError: The range is not finite or is empty.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetry == "symmetric" and low < 0.0:
        # 127 steps lie above the zero point, 128 below.
        return Affine(_checked_scale(name, low, high, max(-low, high) / 127), 128)
    scale = _checked_scale(name, low, high, (high - low) / (UINT8.qmax - UINT8.qmin))
    zero_point = int(np.clip(np.rint(UINT8.qmin - low / np.float64(scale)), UINT8.qmin, UINT8.qmax))
    return Affine(scale, zero_point)


def symmetric_from_range(name: str, low: float, high: float, qmax: int) -> Affine:
    """Spread the larger magnitude of [low, high] over the integers -qmax to qmax of int16.

    Args:
        name: Tensor name, for the message.
        low: Smallest real value.
        high: Largest real value.
        qmax: Largest integer, at most 32767.

    Raises:
        QuantizeError: The range is not finite or is empty.
    """
    scale = _checked_scale(name, low, high, max(-low, high, 0.0) / qmax)
    return Affine(scale, 0, IntRange("int16", -qmax, qmax))


def float8_from_range(name: str, low: float, high: float) -> Affine:
    """Spread the larger magnitude of [low, high] over the numbers of float8, up to 448.

    Args:
        name: Tensor name, for the message.
        low: Smallest real value.
        high: Largest real value.

    Raises:
        QuantizeError: The range is not finite or is empty.
    """
    return Affine(_checked_scale(name, low, high, max(-low, high, 0.0) / FLOAT8.qmax), 0, FLOAT8)


def _checked_scale(name: str, low: float, high: float, scale: float) -> np.float32:
    rounded = np.float32(scale)
    if not np.isfinite(rounded) or rounded < np.finfo(np.float32).tiny:
        raise QuantizeError(f"the range of {name!r} is [{low}, {high}]: it must be finite and not empty to be quantized")
    return rounded


def quantize(values: np.ndarray, affine: Affine) -> np.ndarray:
    """Float -> the tensor's integers, rounding half to even."""
    if not affine.limits.is_integer:
        steps = values.astype(np.float64) / np.float64(affine.scale)
        return np.clip(steps, affine.limits.qmin, affine.limits.qmax).astype(np.float32).astype(affine.limits.dtype)
    whole = np.rint(values.astype(np.float64) / np.float64(affine.scale)) + affine.zero_point
    return np.clip(whole, affine.limits.qmin, affine.limits.qmax).astype(affine.limits.dtype)


def dequantize(values: np.ndarray, affine: Affine) -> np.ndarray:
    """Integers -> float32."""
    if not affine.limits.is_integer:
        return values.astype(np.float32) * affine.scale
    return (values.astype(np.int32) - affine.zero_point).astype(np.float32) * affine.scale
