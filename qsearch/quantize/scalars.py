"""The two vectors of scalar arguments that every kernel takes."""

from __future__ import annotations

import numpy as np

from qsearch.quantize.affine import Affine
from qsearch.quantize.program import FLOATS, INTEGERS

__all__ = ["output_scalars", "scalars"]


def scalars(**values: float) -> dict[str, np.ndarray]:
    """The two scalar argument vectors of a kernel; what is not given keeps a neutral default."""
    defaults: dict[str, float] = {"qmin": 0, "qmax": 255, "a_multiplier": 1, "b_multiplier": 1, "multiplier": 1}
    defaults |= {"low": -np.inf, "high": np.inf} | values
    integers = np.array([defaults.get(name, 0) for name in INTEGERS], np.int32)
    with np.errstate(over="ignore"):
        return {"integers": integers, "floats": np.array([defaults.get(name, 0) for name in FLOATS], np.float32)}


def output_scalars(affine: Affine, clip: tuple[float, float] | None = None) -> dict[str, float]:
    """Zero point and clip bounds of an integer output; the clip of a float16 or float8 one, within what it holds."""
    if affine.limits.is_integer:
        qmin, qmax = affine.clip_bounds(clip)
        return {"zero_point": affine.zero_point, "qmin": qmin, "qmax": qmax}
    steps = np.array(clip or (-np.inf, np.inf)) / np.float64(affine.scale)
    low, high = np.clip(steps, affine.limits.qmin, affine.limits.qmax)
    return {"low": low, "high": high}
