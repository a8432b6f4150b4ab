"""Weight preparation: symmetric integer weights and their scales.

int16 weights are bounded so that no sum leaves int32, whatever the layer reads: activations and weights share
the accumulator's bits about equally. See `qsearch.quantize.program` for the formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qsearch.config import Granularity, WeightScale, WeightSettings
from qsearch.errors import QuantizeError
from qsearch.qtype import FLOAT16, INT16, IntRange

__all__ = [
    "MAX_ACCUMULATOR",
    "AccumulatorBound",
    "QuantizedWeight",
    "activation_limit",
    "fit_weight",
    "half_weight",
    "quantize_weight",
    "rounded_to_tf32",
    "weight_scales",
]

MAX_ACCUMULATOR = 2**31 - 1
# What int16 weights leave of the accumulator to the bias. With it weights depend on no calibration, and can be
# kept from trial to trial; only a channel whose bias needs more is prepared anew.
BIAS_ROOM = 2**28
# The least by which a scale grows when its integers do not fit, and how often it may.
GROWTH, ROUNDS = 1.001, 100

# The scale of a channel whose weights are all zero; any positive number represents zero exactly.
DEAD_SCALE = np.float32(1.0)
# What rule 'mse' tries, as shares of the scale that clips nothing.
MSE_SHARES = np.linspace(1.0, 0.35, 27, dtype=np.float32)


@dataclass(frozen=True)
class QuantizedWeight:
    """A layer's integer weights.

    Attributes:
        values: int8, int16 or float8_e4m3fn (O, kh, kw, I/groups).
        scale: float32 (O,).
        group: Consecutive input channels whose 4-bit integers share an entry of `group_scale`; 0 for none.
        group_scale: uint8 (O, kh, kw, groups) in 1..15, by which the 4-bit integers of `values` were multiplied.
        group_offset: int8, as `group_scale` or (O, 1, 1, 1) without groups, what was added to them then.
    """

    values: np.ndarray
    scale: np.ndarray
    group: int = 0
    group_scale: np.ndarray | None = None
    group_offset: np.ndarray | None = None

    @property
    def tables(self) -> dict[str, np.ndarray]:
        """What its groups have, by name; nothing where an output channel's scale is all there is."""
        tables = {"group_scale": self.group_scale, "group_offset": self.group_offset}
        return {name: table for name, table in tables.items() if table is not None}

    @property
    def bytes(self) -> int:
        """Size of its arrays."""
        return sum(array.nbytes for array in (self.values, self.scale, *self.tables.values()))

    @cached_property
    def sums(self) -> np.ndarray:
        """Sum of every output channel's integers, int64 (O,)."""
        return self.values.reshape(len(self.values), -1).sum(1, dtype=np.int64)

    @cached_property
    def magnitudes(self) -> np.ndarray:
        """Sum of their magnitudes, int64 (O,)."""
        return np.abs(self.values).reshape(len(self.values), -1).sum(1, dtype=np.int64)


def weight_scales(weight: np.ndarray, limits: IntRange, granularity: Granularity, rule: WeightScale) -> np.ndarray:
    """Scales of symmetric weights.

    Args:
        weight: float32 (O, I/groups, kh, kw).
        limits: Integer range of the weights.
        granularity: One scale per output channel, or one for the layer.
        rule: 'max' represents the largest magnitude exactly; 'power_of_two' rounds that scale up to a power of two; 'mse' is
            the scale, of some that clip more or less, with the least squared error after rounding; it gains nothing in float8 and
            counts as 'max' there.

    Returns:
        float32 (O,).
    """
    largest = np.abs(weight).reshape(len(weight), -1).max(1)
    scale = _shaped((largest / limits.qmax).astype(np.float32), granularity, rule)
    if rule != "mse" or not limits.is_integer:
        return scale
    errors = np.stack([_squared_error(weight, scale * np.float32(share), limits) for share in MSE_SHARES])
    if granularity == "layer_wise":
        errors = np.broadcast_to(errors.sum(1, keepdims=True), errors.shape)
    # Of equals the first, which clips least.
    return scale * MSE_SHARES[errors.argmin(0)]


def _squared_error(weight: np.ndarray, scale: np.ndarray, limits: IntRange) -> np.ndarray:
    """Squared rounding error of every output channel, float64 (O,)."""
    unit = scale[:, None]
    rows = weight.reshape(len(weight), -1)
    error = np.clip(np.rint(rows / unit), limits.qmin, limits.qmax) * unit - rows
    return np.einsum("oi,oi->o", error, error, dtype=np.float64)


def _shaped(scale: np.ndarray, granularity: Granularity, rule: WeightScale) -> np.ndarray:
    """The least scales of the wanted form that are not below the given ones; float32 (O,)."""
    if granularity == "layer_wise":
        scale = np.full_like(scale, scale.max())
    scale = np.where(scale < np.finfo(np.float32).tiny, DEAD_SCALE, scale)
    if rule == "power_of_two":
        scale = np.exp2(np.ceil(np.log2(scale.astype(np.float64)))).astype(np.float32)
    return scale


def quantize_weight(weight: np.ndarray, scale: np.ndarray, limits: IntRange) -> QuantizedWeight:
    """Round weights to the nearest integers.

    Args:
        weight: float32 (O, I/groups, kh, kw).
        scale: float32 (O,).
        limits: Integer range of the weights, or that of float8, whose numbers take the integers' place.
    """
    steps = weight / scale[:, None, None, None]
    values = np.clip(np.rint(steps) if limits.is_integer else steps, limits.qmin, limits.qmax).astype(limits.dtype)
    return QuantizedWeight(np.ascontiguousarray(values.transpose(0, 2, 3, 1)), scale)


def half_weight(name: str, weight: np.ndarray) -> np.ndarray:
    """Weights rounded to float16.

    Args:
        name: Layer name, for the message.
        weight: float32, any shape.

    Raises:
        QuantizeError: One of them is too large.
    """
    if (largest := float(np.abs(weight).max(initial=0.0))) > FLOAT16.qmax:
        raise QuantizeError(
            f"layer {name!r} has weights up to {largest:.3g} and float16 ends at {FLOAT16.qmax}: keep it in fp32 with `skip`"
        )
    return weight.astype(np.float16)


def rounded_to_tf32(weight: np.ndarray) -> np.ndarray:
    """The nearest float32 that end with thirteen zero bits, half to even; matrix units would cut these bits off.

    Args:
        weight: float32, any shape.
    """
    bits = np.ascontiguousarray(weight, np.float32).view(np.uint32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & np.uint32(0xFFFFE000)).view(np.float32)


def activation_limit(weight: np.ndarray) -> int:
    """The largest integer that an int16 layer's input may hold, by its weights alone.

    Args:
        weight: float32 (O, I/groups, kh, kw).

    Returns:
        floor(sqrt(2**31 / r)), at most 32767, with r = max over output channels of sum |w| / max |w|.
    """
    magnitude = np.abs(weight).reshape(len(weight), -1).astype(np.float64)
    largest = magnitude.max(1)
    live = (largest > 0) & np.isfinite(largest)
    ratio = float((magnitude[live].sum(1) / largest[live]).max()) if live.any() else 1.0
    return min(INT16.activation.qmax, int(np.sqrt(2**31 / ratio)))


@dataclass(frozen=True)
class AccumulatorBound:
    """What the sums of an int16 layer are held to: largest * sum |w| + |bias| <= limit in every output channel.

    Attributes:
        largest: Largest magnitude of the input's integers.
        limit: Largest magnitude of a sum.
        bias: float64 (O,), or None to leave it out.
        input_scale: Scale of the input; means something beside a bias only.
    """

    largest: int
    limit: int = MAX_ACCUMULATOR
    bias: np.ndarray | None = None
    input_scale: np.float32 = np.float32(1)

    def reach(self, prepared: QuantizedWeight) -> np.ndarray:
        """Largest magnitude that a sum can have, float64 (O,), exact where it fits an int32."""
        reach = prepared.magnitudes.astype(np.float64) * self.largest
        if self.bias is not None:
            reach += np.abs(np.rint(self.bias / (prepared.scale.astype(np.float64) * np.float64(self.input_scale))))
        return reach


def fit_weight(
    name: str, weight: np.ndarray, scale: np.ndarray, settings: WeightSettings, bound: AccumulatorBound
) -> QuantizedWeight:
    """Round weights to int16, raising the scales of channels that would break a bound.

    Args:
        name: Layer name, for the message.
        weight: float32 (O, I/groups, kh, kw).
        scale: float32 (O,), where to start.
        settings: Granularity and rule of the scales; 'mse' gains nothing at 16 bits and counts as 'max'.
        bound: The bound, checked on the integers themselves.

    Raises:
        QuantizeError: No scale was found.
    """
    for _ in range(ROUNDS):
        scale = _shaped(scale, settings.granularity, settings.weight_scale)
        prepared = quantize_weight(weight, scale, INT16.weight)
        reach = bound.reach(prepared)
        fits = reach <= bound.limit
        if fits.all():
            return prepared
        growth = np.where(fits, 1.0, np.maximum(reach / bound.limit, GROWTH))
        scale = (scale * growth).astype(np.float32)
    raise QuantizeError(
        f"layer {name!r}: no weight scale keeps int16 sums within 32 bits (reach {reach.max():.3g}): keep it in fp32 with `skip`"
    )
