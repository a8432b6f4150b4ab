"""4-bit weights with scales and offsets for groups of them that stay integers beside one float scale per output channel.

Two levels of scales as in Dai et al., VS-Quant: Per-vector Scaled Quantization for Accurate Low-Precision Neural Network
Inference, 2021 (arXiv 2102.04503), section 4.4: a weight is scale[o] * w with the integer w = m * q + z of its group,
q in -8..7 and m in 1..15. As w fits a byte, the sum over all groups stays one int32 with one multiplier per output channel.
An offset z moves the sixteen levels to where a group's weights lie (asymmetric weights) and needs no sum of activations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from qsearch.errors import QuantizeError
from qsearch.quantize.weights import DEAD_SCALE, QuantizedWeight

__all__ = ["GroupForm", "coarsened", "group_integers", "group_weights", "spread", "with_integers"]

QMIN, QMAX, LARGEST_SCALE, LARGEST = -8, 7, 15, 127
# Shares of a group's range that its levels may cover, and how many steps of the output channel's scale the widest group's
# step may be. Beyond fifteen steps the widest groups are cut short for the sake of the others.
SHARES = np.linspace(0.5, 1.0, 11)
WIDEST = np.arange(3.0, 21.0, 0.5)
# Input channels of the smallest group: two steps of a kernel's dot products, which share their bytes.
SMALLEST = 8
# Weights worked on at a time.
SLAB = 1 << 19


@dataclass(frozen=True)
class GroupForm:
    """What a layer's groups have.

    Attributes:
        size: Consecutive input channels of a group, a multiple of 8; 0 for no scales of groups.
        offsets: Every group, or without groups every output channel, has an offset.
        search: Scales and offsets are those of the least squared error; without it every weight is within its levels.
    """

    size: int = 0
    offsets: bool = False
    search: bool = True


def spread(table: np.ndarray, shape: tuple[int, ...], size: int) -> np.ndarray:
    """What every weight's group has.

    Args:
        table: (O, kh, kw, groups), or (O, 1, 1, 1) for one per output channel.
        shape: Shape of the weights, (O, kh, kw, I/groups).
        size: Consecutive input channels of a group; 0 for one per output channel.

    Returns:
        int16, of that shape.
    """
    wide = table.astype(np.int16)
    return np.repeat(wide, size, 3)[..., : shape[3]] if size else np.broadcast_to(wide, shape)


def group_integers(values: np.ndarray, scale: np.ndarray | None, offset: np.ndarray | None, size: int) -> np.ndarray:
    """The 4-bit integers of weights in groups: q = (w - z) / m.

    Args:
        values: int8 (O, kh, kw, I/groups), w.
        scale: As QuantizedWeight.group_scale.
        offset: As QuantizedWeight.group_offset.
        size: As QuantizedWeight.group.

    Returns:
        int8, of the same shape.
    """
    whole = values.astype(np.int16)
    if offset is not None:
        whole -= spread(offset, values.shape, size)
    if scale is not None:
        whole //= spread(scale, values.shape, size)
    return whole.astype(np.int8)


def with_integers(prepared: QuantizedWeight, integers: np.ndarray) -> QuantizedWeight:
    """The same scales and offsets with other 4-bit integers, as a method that rounds differently chooses them.

    Args:
        prepared: Weights in groups, or without.
        integers: In -8..7, (O, kh, kw, I/groups).
    """
    whole = integers.astype(np.int16)
    if prepared.group_scale is not None:
        whole = whole * spread(prepared.group_scale, whole.shape, prepared.group)
    if prepared.group_offset is not None:
        whole = whole + spread(prepared.group_offset, whole.shape, prepared.group)
    return replace(prepared, values=np.clip(whole, -LARGEST, LARGEST).astype(np.int8))


def coarsened(weight: np.ndarray, prepared: QuantizedWeight, least: np.ndarray) -> QuantizedWeight:
    """Raise the scales of output channels that are below a bound; their groups lose scales and offsets of their own.

    Args:
        weight: float32 (O, I/groups, kh, kw).
        prepared: Its integers.
        least: float32 (O,), the bound.
    """
    low, scale = (prepared.scale < least)[:, None, None, None], np.maximum(prepared.scale, least).astype(np.float32)
    whole = np.clip(np.rint(weight.transpose(0, 2, 3, 1) / scale[:, None, None, None]), QMIN, QMAX)
    factor, offset = prepared.group_scale, prepared.group_offset
    return replace(
        prepared,
        values=np.where(low, whole, prepared.values).astype(np.int8),
        scale=scale,
        group_scale=None if factor is None else np.where(low, 1, factor).astype(np.uint8),
        group_offset=None if offset is None else np.where(low, 0, offset).astype(np.int8),
    )


def group_weights(weight: np.ndarray, base: np.ndarray, form: GroupForm) -> QuantizedWeight:
    """Quantize weights in groups to 4 bits.

    An output channel whose squared error would be larger than with `base` alone keeps that: scales of one, no offset.
    Where a kernel position has fewer than 8 input channels (depthwise layers have one), scales of groups would come to
    more than their weights gain: such a layer's output channels are quantized as a whole, with an offset if groups have
    them.

    Args:
        weight: float32 (O, I/groups, kh, kw).
        base: float32 (O,), symmetric scales per output channel, see `weights.weight_scales`.
        form: What groups have.

    Raises:
        QuantizeError: The groups' size is no multiple of 8.
    """
    if form.size % SMALLEST or form.size < 0:
        raise QuantizeError(
            f"weights cannot be in groups of {form.size} input channels: choose a multiple of 8, such as 16 or 32"
        )
    if weight.shape[1] < SMALLEST:
        form = replace(form, size=0)
    moved = weight.transpose(0, 2, 3, 1)
    rows = max(1, SLAB // max(1, int(np.prod(weight.shape[1:]))))
    parts = [_fitted(moved[i : i + rows], base[i : i + rows], form) for i in range(0, len(weight), rows)]
    scale, factor, offset, values = (np.concatenate(part) for part in zip(*parts, strict=True))
    return QuantizedWeight(values, scale, form.size, factor if form.size else None, offset if form.offsets else None)


@dataclass(frozen=True)
class _Levels:
    """Levels of every group: scale float32 (O, 1, 1), factor and offset float32 (O, groups, 1)."""

    scale: np.ndarray
    factor: np.ndarray
    offset: np.ndarray

    def integers(self, blocks: np.ndarray) -> np.ndarray:
        """The nearest levels w = m q + z, as float32."""
        q = np.clip(np.rint((blocks / self.scale - self.offset) / self.factor), QMIN, QMAX)
        return q * self.factor + self.offset

    def errors(self, blocks: np.ndarray, real: np.ndarray) -> np.ndarray:
        """Squared error of every group, float32 (O, groups, 1)."""
        return (np.square(blocks - self.integers(blocks) * self.scale) * real).sum(2, keepdims=True)

    def where(self, better: np.ndarray, other: _Levels) -> _Levels:
        """The other levels in the output channels, bool (O, 1, 1), where they are better."""
        pairs = ((self.scale, other.scale), (self.factor, other.factor), (self.offset, other.offset))
        return _Levels(*(np.where(better, new, old).astype(np.float32) for old, new in pairs))


def _fitted(weight: np.ndarray, base: np.ndarray, form: GroupForm) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scale, factors, offsets and integers of some output channels; weight is (O, kh, kw, I/groups)."""
    blocks, real = _blocks(weight, form.size)
    neutral = np.ones((len(weight), blocks.shape[1], 1), np.float32)
    best = _Levels(base.reshape(-1, 1, 1), neutral, 0 * neutral)
    least = best.errors(blocks, real)
    live = blocks.any((1, 2), keepdims=True)
    for found in _candidates(blocks, real, form):
        errors = found.errors(blocks, real)
        better = live & (errors.sum(1, keepdims=True) < least.sum(1, keepdims=True))
        best, least = best.where(better, found), np.where(better, errors, least)
    if form.search:
        best = _refined(best, least, blocks, real, form)
    whole = best.integers(blocks).astype(np.int8)
    shape = (*weight.shape[:3], -1) if form.size else (len(weight), 1, 1, 1)
    values = whole.reshape(*weight.shape[:3], -1)[..., : weight.shape[3]]
    factor, offset = best.factor.astype(np.uint8).reshape(shape), best.offset.astype(np.int8).reshape(shape)
    return best.scale.ravel(), factor, offset, np.ascontiguousarray(values)


def _blocks(weight: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights by group, float32 (O, groups, elements), the last of a position filled up; and 1 where they are real."""
    rest = -weight.shape[3] % size if size else 0
    filled = np.pad(weight, ((0, 0), (0, 0), (0, 0), (0, rest)), mode="edge").astype(np.float32)
    real = np.pad(np.ones(weight.shape[1:], np.float32), ((0, 0), (0, 0), (0, rest)))
    elements = size or int(np.prod(weight.shape[1:]))
    return filled.reshape(len(weight), -1, elements), real.reshape(-1, elements)


def _candidates(blocks: np.ndarray, real: np.ndarray, form: GroupForm) -> list[_Levels]:
    """Levels worth comparing: from every group's own best step, the scale of which the steps are about multiples."""
    low, high = blocks.min(2, keepdims=True), blocks.max(2, keepdims=True)
    range_ = (high - low) / (QMAX - QMIN) if form.offsets else np.maximum(high / QMAX, low / QMIN)
    middle = (high + low) / 2 if form.offsets else np.zeros_like(low)
    step = np.maximum(range_, np.float32(1e-6) * np.abs(blocks).max((1, 2), keepdims=True))
    step = np.where(step < np.finfo(np.float32).tiny, DEAD_SCALE, step)
    if form.search:
        step = _best_share(step, middle, blocks, real, form)
    if not form.size:
        return [_levels(share * step, np.ones_like(step), middle, form) for share in (SHARES if form.search else (1.0,))]
    # With an offset a group's levels may lie to one side of zero, and reach beyond its range by eight scales and a half.
    reach = np.abs(blocks).max((1, 2), keepdims=True) / np.float32(LARGEST - 9) * form.offsets
    found = []
    for widest in WIDEST if form.search else (float(LARGEST_SCALE),):
        scale = np.maximum(step.max(1, keepdims=True) / np.float32(widest), reach)
        # Not to cut any weight short, a step is rounded up; the margin is for the division's own rounding.
        multiple = np.rint(step / scale) if form.search else np.ceil(step / scale - np.float32(1e-4))
        found.append(_levels(scale, np.clip(multiple, 1, LARGEST_SCALE), middle, form))
    return found


def _best_share(step: np.ndarray, middle: np.ndarray, blocks: np.ndarray, real: np.ndarray, form: GroupForm) -> np.ndarray:
    """Every group's own step of least squared error, were scales free."""
    best, least = step, np.full_like(step, np.inf)
    for share in SHARES:
        tried = (share * step).astype(np.float32)
        offset = middle / tried + np.float32(0.5) if form.offsets else np.zeros_like(step)
        errors = _Levels(tried, np.ones_like(step), offset).errors(blocks, real)
        best, least = np.where(errors < least, tried, best), np.minimum(errors, least)
    return best


def _levels(scale: np.ndarray, factor: np.ndarray, middle: np.ndarray, form: GroupForm) -> _Levels:
    """Levels about the middle of every group's range, all of them within a byte."""
    scale, factor = np.maximum(scale, np.finfo(np.float32).tiny).astype(np.float32), factor.astype(np.float32)
    offset = np.rint(middle / scale + factor / 2) if form.offsets else np.zeros_like(factor)
    return _Levels(scale, factor, np.clip(offset, -LARGEST - QMIN * factor, LARGEST - QMAX * factor))


def _refined(best: _Levels, least: np.ndarray, blocks: np.ndarray, real: np.ndarray, form: GroupForm) -> _Levels:
    """Neighbouring factors and offsets, group by group."""
    moves = [(1, 0), (-1, 0)] * bool(form.size) + [(0, 1), (0, -1)] * form.offsets
    for more, shift in moves:
        factor = np.clip(best.factor + more, 1, LARGEST_SCALE)
        offset = np.clip(best.offset + shift, -LARGEST - QMIN * factor, LARGEST - QMAX * factor)
        tried = _Levels(best.scale, factor, offset)
        errors = tried.errors(blocks, real)
        better = errors < least
        best = replace(best, factor=np.where(better, factor, best.factor), offset=np.where(better, offset, best.offset))
        least = np.minimum(errors, least)
    return best
