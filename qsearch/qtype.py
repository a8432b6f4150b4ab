"""Precisions a layer can run in.

A precision names how a layer's activations and weights are held. New ones (16-bit activations, 4-bit
weights) are added here; lowering and kernels look precisions up by name.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FP32", "INT8", "PRECISIONS", "IntRange", "Precision"]


@dataclass(frozen=True)
class IntRange:
    """An integer storage type and the part of it that is used.

    Attributes:
        dtype: NumPy name of the storage type.
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
        activation: Integer range of its input activations, None for float32.
        weight: Integer range of its weights, None for float32.
    """

    name: str
    activation: IntRange | None
    weight: IntRange | None

    @property
    def is_integer(self) -> bool:
        """True if the layer accumulates integers."""
        return self.activation is not None


FP32 = Precision("fp32", None, None)
# Weights stay within +-127 so that every scale is symmetric and -128 never occurs.
INT8 = Precision("int8", IntRange("uint8", 0, 255), IntRange("int8", -127, 127))

PRECISIONS: dict[str, Precision] = {p.name: p for p in (FP32, INT8)}
