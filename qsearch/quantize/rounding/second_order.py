"""Second-order weight rounding: the integers and scales of least output error, as the input's covariance tells it.

It needs the float network only: neither what other layers are rounded to nor how activations are, so that a layer is
rounded once for all mixtures of precisions. Measured on a network of 50 layers, the covariance of the rounded network's
own inputs serves no better. The mean of the error is left to bias correction.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from qsearch.calibrate.input_moments import InputMoments
from qsearch.config import Granularity, WeightScale
from qsearch.models.interpret import one_thread
from qsearch.qtype import W4A8, IntRange
from qsearch.quantize.group_scales import spread, with_integers
from qsearch.quantize.rounding.columns import Columns, columns_of, compensated, descended
from qsearch.quantize.weights import DEAD_SCALE, QuantizedWeight

__all__ = ["output_errors", "round_in_groups", "round_second_order"]

# What is tried, as shares of the scale that clips nothing; at more bits clipping does not pay.
FEW_BITS_SHARES, SHARES = tuple(np.linspace(1.0, 0.45, 12)), (1.0, 0.95, 0.9)
FEW_BITS_QMAX = 15
# Refinements of integers and scale in turns, and sweeps over the integers in each.
REFINEMENTS, SWEEPS = 1, 2
# Weights that are rounded at a time.
CHUNK = 2**22


@one_thread()
@torch.no_grad()
def round_second_order(
    name: str,
    weight: np.ndarray,
    moments: InputMoments,
    limits: IntRange,
    granularity: Granularity = "channel_wise",
    rule: WeightScale = "max",
) -> QuantizedWeight:
    """Round a layer's weights.

    Scales are chosen by the error that they lead to. Then coordinate descent over the integers and the least-squares
    scale, s = w C q' / q C q', take turns; each lowers the error.

    Args:
        name: Layer name, for messages.
        weight: float32 (O, I/groups, kh, kw).
        moments: Of the layer's input.
        limits: Integer range of the weights.
        granularity: One scale per output channel, or one for the layer.
        rule: 'power_of_two' keeps scales to powers of two; every other rule leaves them to the error.

    Returns:
        The integer weights.

    Raises:
        QuantizeError: Weights or moments are not finite, or do not belong together.
    """
    columns = columns_of(name, torch.tensor(weight), moments, limits)
    shared = granularity == "layer_wise"
    candidates = _candidates(columns, shared, rule == "power_of_two")
    integers, scale = _joined([_started(part, tried) for part, tried in _chunks(columns, candidates)], candidates, shared)
    if rule != "power_of_two":
        for _ in range(REFINEMENTS):
            integers = descended(columns, integers, scale, SWEEPS)
            scale = _refitted(columns, integers, scale, shared)
    integers, nearest = descended(columns, integers, scale, 1), columns.nearest(scale)
    # The scale has moved since the integers were begun with.
    worse = columns.errors(nearest, scale) < columns.errors(integers, scale)
    integers = torch.where(worse[..., None], nearest, integers)
    values = columns.restored(integers).reshape(weight.shape).permute(0, 2, 3, 1)
    return QuantizedWeight(np.ascontiguousarray(values.numpy().astype(limits.dtype)), scale.reshape(-1).numpy().copy())


@one_thread()
@torch.no_grad()
def round_in_groups(name: str, weight: np.ndarray, moments: InputMoments, prepared: QuantizedWeight) -> QuantizedWeight:
    """Round a layer's weights to the levels of groups: scales and offsets are given, the 4-bit integers are chosen.

    Args:
        name: Layer name, for messages.
        weight: float32 (O, I/groups, kh, kw).
        moments: Of the layer's input.
        prepared: The weights in groups, see `group_weights`, whose integers are replaced.

    Raises:
        QuantizeError: Weights or moments are not finite, or do not belong together.
    """
    columns = columns_of(name, torch.tensor(weight), moments, W4A8.weight)
    shape, unit = prepared.values.shape, prepared.scale[:, None, None, None].astype(np.float32)
    step, offset = (
        np.broadcast_to(np.float32(neutral) if table is None else spread(table, shape, prepared.group), shape) * unit
        for table, neutral in ((prepared.group_scale, 1.0), (prepared.group_offset, 0.0))
    )
    scale, shift = (columns.ordered(_by_rows(one, columns)) for one in (step, offset))
    moved = replace(columns, rows=columns.rows - shift)
    integers, nearest = compensated(moved, scale), moved.nearest(scale)
    worse = moved.errors(nearest, scale) < moved.errors(integers, scale)
    integers = descended(moved, torch.where(worse[..., None], nearest, integers), scale, REFINEMENTS + SWEEPS)
    values = columns.restored(integers).reshape(weight.shape).permute(0, 2, 3, 1)
    return with_integers(prepared, values.numpy())


def _by_rows(values: np.ndarray, columns: Columns) -> Tensor:
    """(O, kh, kw, I/groups) as float32 (groups, R, K)."""
    return torch.tensor(values.transpose(0, 3, 1, 2).astype(np.float32)).reshape(columns.rows.shape)


def output_errors(weight: np.ndarray, quantized: QuantizedWeight, moments: InputMoments) -> np.ndarray:
    """Mean squared error of every output channel that rounding its weights causes, the mean error corrected.

    Args:
        weight: float32 (O, I/groups, kh, kw).
        quantized: Its integers.
        moments: Of the layer's input.

    Returns:
        float64 (O,): e C e', e the change of a channel's weights and C the covariance of what it reads.
    """
    real = quantized.values.transpose(0, 3, 1, 2).astype(np.float64) * quantized.scale[:, None, None, None]
    error = (real - weight).reshape(len(moments.mean), -1, moments.mean.shape[1])
    return ((error @ moments.covariance) * error).sum(-1).reshape(-1)


def _candidates(columns: Columns, shared: bool, power_of_two: bool) -> Tensor:
    """Scales to try, float32 (shares, groups, R, 1)."""
    limits, rows = columns.limits, columns.rows
    largest = torch.maximum(rows.amax(-1, keepdim=True) / limits.qmax, rows.amin(-1, keepdim=True) / limits.qmin)
    if shared:
        largest = largest.max().expand_as(largest)
    largest = torch.where(largest < torch.finfo(torch.float32).tiny, float(DEAD_SCALE), largest)
    if power_of_two:
        return torch.exp2(torch.log2(largest).ceil()) * torch.tensor([1.0, 0.5]).reshape(-1, 1, 1, 1)
    shares = FEW_BITS_SHARES if limits.qmax <= FEW_BITS_QMAX else SHARES
    return largest * torch.tensor(shares, dtype=torch.float32).reshape(-1, 1, 1, 1)


def _chunks(columns: Columns, candidates: Tensor) -> list[tuple[Columns, Tensor]]:
    groups, rows, size = columns.rows.shape
    step = max(1, CHUNK // (groups * size * len(candidates)))
    return [(columns.chunk(start, start + step), candidates[:, :, start : start + step]) for start in range(0, rows, step)]


def _started(columns: Columns, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Integers int8 or int16 (shares, groups, R, K) and errors (shares, groups, R) for every candidate scale."""
    shares, (groups, rows, size) = len(candidates), columns.rows.shape
    scale = candidates.permute(1, 0, 2, 3).reshape(groups, shares * rows, 1)
    repeated = columns.repeated(shares)
    integers, nearest = compensated(repeated, scale), repeated.nearest(scale)
    errors, plain = repeated.errors(integers, scale), repeated.errors(nearest, scale)
    # Where clipping leaves nothing to make up with, the sweep can do worse than no sweep.
    integers = torch.where((plain < errors)[..., None], nearest, integers)
    errors = torch.minimum(errors, plain).reshape(groups, shares, rows)
    stored = integers.to(getattr(torch, columns.limits.dtype)).reshape(groups, shares, rows, size)
    return stored.transpose(0, 1), errors.transpose(0, 1)


def _joined(parts: list[tuple[Tensor, Tensor]], candidates: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    """The candidates of least error, by row or for all: integers float32 (groups, R, K) and scale (groups, R, 1)."""
    integers, errors = torch.cat([one for one, _ in parts], 2), torch.cat([one for _, one in parts], 2)
    if shared:
        errors = errors.sum((1, 2), keepdim=True).expand_as(errors)
    best = errors.argmin(0, keepdim=True)[..., None]
    chosen = integers.gather(0, best.expand(1, *integers.shape[1:]))[0]
    return chosen.float(), candidates.gather(0, best)[0]


def _refitted(columns: Columns, integers: Tensor, scale: Tensor, shared: bool) -> Tensor:
    """Scales of least error for given integers; the old ones where there is none."""
    weighted = integers @ columns.covariance
    above = (weighted * columns.rows).sum(-1, keepdim=True)
    below = (weighted * integers).sum(-1, keepdim=True)
    if shared:
        above, below = above.sum().expand_as(above), below.sum().expand_as(below)
    fitted = above / below
    return torch.where(fitted.isfinite() & (fitted > torch.finfo(torch.float32).tiny), fitted, scale)
