"""Precisions a layer can run in.

A precision names how a layer's activations and weights are held. New ones are added here; lowering and
kernels look precisions up by name.
"""

from __future__ import annotations

from dataclasses import dataclass

# Makes NumPy know 'float8_e4m3fn' by name.
import ml_dtypes  # noqa: F401

__all__ = [
    "FLOAT8",
    "FLOAT16",
    "FP8",
    "FP16",
    "FP32",
    "INT8",
    "INT16",
    "PRECISIONS",
    "TF32",
    "UINT8",
    "UNSCALED",
    "W4A8",
    "IntRange",
    "Precision",
]


@dataclass(frozen=True)
class IntRange:
    """A storage type and the part of it that is used.

    Attributes:
        dtype: NumPy name of the storage type; 'float32' has no range.
        qmin: Smallest number used, an integer.
        qmax: Largest one; of 'float16' and 'float8_e4m3fn' the largest finite one.
    """

    dtype: str
    qmin: int
    qmax: int

    @property
    def is_integer(self) -> bool:
        """True if its numbers are integers."""
        return "int" in self.dtype


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
        return self.activation.is_integer


FLOAT32 = IntRange("float32", 0, 0)
FLOAT16 = IntRange("float16", -65504, 65504)
FLOAT8 = IntRange("float8_e4m3fn", -448, 448)
UINT8 = IntRange("uint8", 0, 255)

FP32 = Precision("fp32", FLOAT32, FLOAT32)
# Held as float32; of the numbers that a GPU's matrix units multiply they read the upper 19 bits. Sums are float32.
TF32 = Precision("tf32", FLOAT32, FLOAT32)
# Sums are float32.
FP16 = Precision("fp16", FLOAT16, FLOAT16)
# Weights stay within +-127 so that every scale is symmetric and -128 never occurs.
INT8 = Precision("int8", UINT8, IntRange("int8", -127, 127))
# Numbers of 4 exponent and 3 mantissa bits, times a scale per tensor and per output channel. Sums are float32.
FP8 = Precision("fp8", FLOAT8, FLOAT8)
# The widest ranges: how much of them is used is bounded per tensor and channel, so that sums fit 32 bits.
INT16 = Precision("int16", IntRange("int16", -32767, 32767), IntRange("int16", -32767, 32767))
# Four-bit weights beside int8's activations, all sixteen integers; held one to a byte until a kernel packs them.
W4A8 = Precision("w4a8", UINT8, IntRange("int8", -8, 7))

# From the most precise to the smallest.
PRECISIONS: dict[str, Precision] = {p.name: p for p in (FP32, TF32, FP16, INT16, INT8, FP8, W4A8)}
# Those whose numbers need no scales: neither calibration nor how weights are scaled means anything to them.
UNSCALED = ("fp32", "tf32", "fp16")
