"""Lay the constants of a convolution out in the order its kernel reads them."""

from __future__ import annotations

import numpy as np

from qsearch.kernels.cpu.buffers import channel_constants
from qsearch.kernels.cpu.conv_plan import ConvPlan
from qsearch.kernels.cpu.weight_groups import WeightGroups
from qsearch.quantize.group_scales import group_integers

__all__ = ["pack_constants", "pack_weight"]


def pack_constants(plan: ConvPlan, constants: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """What every output channel has (bias, multiplier), by group, part, column and lane; then the scalars."""
    channel, used = _channels(plan)
    offset = plan.isa.activation_offset if plan.weight_dtype == "int8" else 0
    if offset:
        sums = constants["weight"].reshape(len(constants["bias"]), -1).sum(1, dtype=np.int32)
        constants = constants | {"bias": constants["bias"] + offset * sums}
    rows = []
    for name in channel_constants(plan.key):
        per_group = constants[name].reshape(plan.key.conv.groups, plan.out_channels)
        rows.append(np.where(used, per_group[:, channel], 0).astype(per_group.dtype).ravel())
    return (*rows, constants["integers"], constants["floats"])


def _channels(plan: ConvPlan) -> tuple[np.ndarray, np.ndarray]:
    """(packed columns of a group, lanes): the output channel of every lane, and whether the lane is used at all."""
    lanes = plan.isa.lanes
    channel = np.arange(plan.all_columns * lanes).reshape(plan.all_columns, lanes)
    if plan.out_channels >= lanes:
        channel[-1] = np.arange(plan.out_channels - lanes, plan.out_channels)
    starts = [plan.first_column(part) for part in range(plan.parts)]
    channel = np.concatenate([channel[start : start + plan.columns] for start in starts])
    used = channel < plan.out_channels
    return np.where(used, channel, 0), used


def pack_weight(plan: ConvPlan, constants: dict[str, np.ndarray]) -> np.ndarray:
    """Lay weights out in the order the kernel reads them: group, part, chunk of columns, step, column, lane, element.

    Args:
        plan: The kernel.
        constants: With weight int8, int16 or float32 (O, kh, kw, I/groups), and what its groups have.

    Returns:
        Flat array, zero where a column or a contraction group is incomplete. For 4-bit weights a byte holds the
        same place of two adjacent vectors, each plus eight: the earlier in its low half. For weights in groups, see
        `weight_groups`.
    """
    if plan.weight_groups is not None:
        return _pack_groups(plan, plan.weight_groups, constants)
    weight = constants["weight"]
    channel, used = _channels(plan)
    groups, (rows, count, steps) = plan.key.conv.groups, plan.steps
    elements = plan.segments[1]
    dense = weight.reshape(groups, plan.out_channels, rows, count, elements)
    padded = np.zeros((*dense.shape[:-1], steps * plan.group), weight.dtype)
    padded[..., :elements] = dense
    columns = padded[:, channel] * used[None, :, :, None, None, None].astype(weight.dtype)
    columns = columns.reshape(groups * plan.parts, plan.columns, plan.isa.lanes, rows * count * steps, plan.group)
    chunks = []
    for run in columns:
        for first in range(0, plan.columns, plan.tile.columns):
            chunk = run[first : first + plan.tile.columns].transpose(2, 0, 1, 3).reshape(-1, plan.isa.lanes * plan.group)
            chunks.append(_nibbles(chunk) if plan.nibbles else chunk.ravel())
    return np.concatenate(chunks)


def _pack_groups(plan: ConvPlan, groups: WeightGroups, constants: dict[str, np.ndarray]) -> np.ndarray:
    """4-bit integers by group, part, chunk; then scales and offsets by group, part and column."""
    channel, _ = _channels(plan)
    weight, scale, offset = (constants.get(name) for name in ("weight", "group_scale", "group_offset"))
    assert weight is not None
    integers = group_integers(weight, scale, offset, plan.key.weight_group)

    def columns(table: np.ndarray) -> np.ndarray:
        """(O, ...) -> (groups * packed columns, lanes, ...)."""
        split = table.reshape(plan.key.conv.groups, plan.out_channels, *table.shape[1:])
        return split[:, channel].reshape(-1, plan.isa.lanes, *table.shape[1:])

    vectors, parts = columns(integers.reshape(len(integers), groups.positions, groups.channels)), []
    for run in range(0, len(vectors), plan.columns):
        for first in range(run, run + plan.columns, plan.tile.columns):
            parts.append(groups.pack(vectors[first : min(first + plan.tile.columns, run + plan.columns)]))
    tables = (None if table is None else columns(table.reshape(len(table), -1)) for table in (scale, offset))
    return np.concatenate([*parts, groups.pack_tables(*tables)])


def _nibbles(vectors: np.ndarray) -> np.ndarray:
    """int8 (vectors, elements) in -8..7 -> two to a byte."""
    if len(vectors) % 2:
        vectors = np.concatenate([vectors, np.zeros_like(vectors[:1])])
    halves = (vectors + 8).astype(np.uint8)
    return (halves[0::2] | halves[1::2] << 4).view(np.int8).ravel()
