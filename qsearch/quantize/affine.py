"""Affine quantization: real = scale * (integer - zero_point).

Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
2018. Activations use the unsigned 8-bit range and an integer zero point, so that zero is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qsearch.errors import QuantizeError
from qsearch.qtype import UINT8

__all__ = ["Affine", "affine_from_range", "dequantize", "quantize"]

QMIN, QMAX = UINT8.qmin, UINT8.qmax


@dataclass(frozen=True)
class Affine:
    """Scale and zero point of a uint8 tensor.

    Attributes:
        scale: Real distance of neighbouring integers, float32.
        zero_point: The integer that stands for zero, in [0, 255].
    """

    scale: np.float32
    zero_point: int

    def clip_bounds(self, clip: tuple[float, float] | None) -> tuple[int, int]:
        """The integers that a real clip (low, high) maps to, within [0, 255]."""
        if clip is None:
            return QMIN, QMAX
        low, high = (np.rint(np.float64(bound) / np.float64(self.scale)) + self.zero_point for bound in clip)
        return int(np.clip(low, QMIN, QMAX)), int(np.clip(high, QMIN, QMAX))


def affine_from_range(name: str, low: float, high: float) -> Affine:
    """Spread [low, high], widened to contain zero, over the 256 integers.

    Args:
        name: Tensor name, for the message.
        low: Smallest real value.
        high: Largest real value.

    Raises:
        QuantizeError: The range is not finite or is empty.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / (QMAX - QMIN))
    if not np.isfinite(scale) or scale < np.finfo(np.float32).tiny:
        raise QuantizeError(f"the range of {name!r} is [{low}, {high}]: it must be finite and not empty to be quantized")
    zero_point = int(np.clip(np.rint(QMIN - low / np.float64(scale)), QMIN, QMAX))
    return Affine(scale, zero_point)


def quantize(values: np.ndarray, affine: Affine) -> np.ndarray:
    """Float -> uint8, rounding half to even."""
    whole = np.rint(values.astype(np.float64) / np.float64(affine.scale)) + affine.zero_point
    return np.clip(whole, QMIN, QMAX).astype(np.uint8)


def dequantize(values: np.ndarray, affine: Affine) -> np.ndarray:
    """uint8 -> float32."""
    return (values.astype(np.int32) - affine.zero_point).astype(np.float32) * affine.scale
