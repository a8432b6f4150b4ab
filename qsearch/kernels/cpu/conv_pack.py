"""Lay the constants of a convolution out in the order its kernel reads them."""

from __future__ import annotations

import numpy as np

from qsearch.kernels.cpu.conv_plan import ConvPlan

__all__ = ["pack_constants", "pack_weight"]


def pack_constants(plan: ConvPlan, constants: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Bias and multiplier by group, column and lane; then the scalars."""
    channel, used = _channels(plan)
    if plan.integer and plan.isa.activation_offset:
        sums = constants["weight"].reshape(len(constants["bias"]), -1).sum(1, dtype=np.int32)
        constants = constants | {"bias": constants["bias"] + plan.isa.activation_offset * sums}
    rows = []
    for name in ("bias", "multiplier") if plan.integer else ("bias",):
        per_group = constants[name].reshape(plan.key.conv.groups, plan.out_channels)
        rows.append(np.where(used, per_group[:, channel], 0).astype(per_group.dtype).ravel())
    return (*rows, constants["integers"], constants["floats"])


def _channels(plan: ConvPlan) -> tuple[np.ndarray, np.ndarray]:
    """(columns, lanes): the output channel of every lane, and whether the lane is used at all."""
    lanes = plan.isa.lanes
    channel = np.arange(plan.columns * lanes).reshape(plan.columns, lanes)
    if plan.out_channels >= lanes:
        channel[-1] = np.arange(plan.out_channels - lanes, plan.out_channels)
    used = channel < plan.out_channels
    return np.where(used, channel, 0), used


def pack_weight(plan: ConvPlan, weight: np.ndarray) -> np.ndarray:
    """Lay weights out in the order the kernel reads them: group, chunk of columns, step, column, lane, element.

    Args:
        plan: The kernel.
        weight: int8 or float32 (O, kh, kw, I/groups).

    Returns:
        Flat array, zero where a column or a contraction group is incomplete.
    """
    channel, used = _channels(plan)
    groups, (rows, count, steps) = plan.key.conv.groups, plan.steps
    elements = plan.segments[1]
    dense = weight.reshape(groups, plan.out_channels, rows, count, elements)
    padded = np.zeros((*dense.shape[:-1], steps * plan.group), weight.dtype)
    padded[..., :elements] = dense
    columns = padded[:, channel] * used[None, :, :, None, None, None].astype(weight.dtype)
    columns = columns.reshape(groups, plan.columns, plan.isa.lanes, rows * count * steps, plan.group)
    chunks = []
    for g in range(groups):
        for first in range(0, plan.columns, plan.tile.columns):
            chunk = columns[g, first : first + plan.tile.columns]
            chunks.append(chunk.transpose(2, 0, 1, 3).ravel())
    return np.concatenate(chunks)
