"""Precisions a layer can run in.

A precision names how a layer's activations and weights are held. New ones are added here; lowering and
kernels look precisions up by name.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FP32", "INT16", "INT8", "PRECISIONS", "UINT8", "W4A8", "IntRange", "Precision"]


@dataclass(frozen=True)
class IntRange:
    """A storage type and, for integers, the part of it that is used.

    Attributes:
        dtype: NumPy name of the storage type; 'float32' has no range.
        qmin: Smallest integer used.
        qmax: Largest integer used.
    """

    dtype: str
    qmin: int
    qmax: int


@dataclass(frozen=True)
class Precision:
    """How one layer computes.

    Attributes:
        name: The name used in configurations and search spaces.
        activation: Range of its input activations.
        weight: Range of its weights.
    """

    name: str
    activation: IntRange
    weight: IntRange

    @property
    def is_integer(self) -> bool:
        """True if the layer accumulates integers."""
        return self.activation.dtype != "float32"


FLOAT32 = IntRange("float32", 0, 0)
UINT8 = IntRange("uint8", 0, 255)

FP32 = Precision("fp32", FLOAT32, FLOAT32)
# Weights stay within +-127 so that every scale is symmetric and -128 never occurs.
INT8 = Precision("int8", UINT8, IntRange("int8", -127, 127))
# The widest ranges: how much of them is used is bounded per tensor and channel, so that sums fit 32 bits.
INT16 = Precision("int16", IntRange("int16", -32767, 32767), IntRange("int16", -32767, 32767))
# Four-bit weights beside int8's activations, all sixteen integers; held one to a byte until a kernel packs them.
W4A8 = Precision("w4a8", UINT8, IntRange("int8", -8, 7))

# From the most precise to the smallest.
PRECISIONS: dict[str, Precision] = {p.name: p for p in (FP32, INT16, INT8, W4A8)}
