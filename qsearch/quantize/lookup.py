"""The table of a pointwise function between two 8-bit tensors."""

from __future__ import annotations

import numpy as np

from qsearch.quantize.affine import Affine, dequantize, quantize
from qsearch.quantize.reference import activation

__all__ = ["lookup_table"]


def lookup_table(function: str, clip: tuple[float, float] | None, given: Affine, made: Affine) -> np.ndarray:
    """What each of the 256 integers of the input becomes.

    Args:
        function: Name of the function; 'clip' for a clip alone.
        clip: (low, high), of a clip.
        given: Scale and zero point of the input.
        made: Those of the output.

    Returns:
        uint8 (256,).
    """
    real = dequantize(np.arange(256, dtype=np.uint8), given)
    if function == "clip":
        assert clip is not None
        return quantize(np.clip(real, *clip), made)
    return quantize(activation(function, real), made)
