"""Record of a bundle's scales: which values share one, what they are made of, and what each operation has to do with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qsearch.export import rescale
from qsearch.models.graph import Model
from qsearch.qtype import PRECISIONS
from qsearch.quantize.affine import Affine, affine_from_range
from qsearch.quantize.lookup import lookup_table
from qsearch.quantize.program import Op, Program
from qsearch.quantize.whole_pictures import quantized_pixels

__all__ = ["append_array", "describe_scales", "lookup_tables"]

# How much wider the ranges are of the module that statistics are recorded with; less where a clip ends before.
WIDENING = 4.0
# What operations between uint8 values can be given other scales.
_COMPUTES = ("conv2d", "add", "mul", "concat", "avg_pool2d", "max_pool2d", "gather", "lookup", "activation")
_CONVERTS = ("pixels", "quantize", "dequantize", "requantize", "to_channels_last", "to_channels_first")


@dataclass
class _Groups:
    """Values that must have one scale, by the name of the first of them."""

    parent: dict[str, str] = field(default_factory=dict)

    def of(self, name: str) -> str:
        """The first of the values that share its scale."""
        while self.parent.setdefault(name, name) != name:
            name = self.parent[name]
        return name

    def join(self, first: str, second: str) -> None:
        """Let two values share a scale."""
        self.parent[self.of(second)] = self.of(first)


def describe_scales(
    program: Program, model: Model, input_range: tuple[float, float], normalised: np.ndarray | None = None
) -> dict[str, Any]:
    """Everything of the record but the places in a module's file.

    Args:
        program: The program.
        model: What it was lowered from.
        input_range: (low, high) that preprocessed images can have.
        normalised: What pixels are, by `normalised_pixels`, of a program that takes these.

    Returns:
        values: of all that share a scale, `name`, `scale`, `zero_point`, `wide_scale`, `wide_zero_point`, `clip`, `replaceable`;
        ops: those that read or write what is replaceable, see `rescale.rescaled`; parts of the record's arrays.
    """
    groups, output_of = _Groups(), {op.output.name: op for op in program.ops}
    for op in program.ops:
        for name in _sharing(op):
            if name in program.affines:
                groups.join(name, op.output.name)
    order = [name for name in output_of if name in program.affines]
    firsts = list(dict.fromkeys(groups.of(name) for name in order))
    frozen = {groups.of(name) for name in order if output_of[name].output.dtype != "uint8"}
    frozen |= {groups.of(n) for op in program.ops if not _is_supported(op) for n in (*op.inputs, op.output.name) if n in order}
    clips = {op.output.name: _clip(op, model, input_range) for op in program.ops}
    values = []
    for first in firsts:
        members = [name for name in order if groups.of(name) == first]
        written = [clips[name] for name in members if output_of[name].key.kind not in rescale.MOVES]
        values.append(_value(program.affines[first], members, _union(written), first not in frozen))
    number = {name: firsts.index(groups.of(name)) for name in order}
    arrays: dict[str, list[np.ndarray]] = {"sums": [], "high": [], "lanes": []}
    arrays["normalised"] = [] if normalised is None else [normalised]
    ops = []
    for call, op in enumerate(program.ops):
        row = _operation(op, number, clips[op.output.name], model, arrays) | {"position": call}
        if any(value >= 0 and values[value]["replaceable"] for value in (*row["inputs"], row["output"])):
            ops.append(row)
    return {"format": rescale.FORMAT, "version": rescale.VERSION, "values": values, "ops": ops, "parts": arrays}


def _sharing(op: Op) -> Sequence[str]:
    """Inputs whose scale is the output's, whatever it is."""
    if op.key.kind in rescale.MOVES:
        return op.inputs[:1]
    if op.key.kind == "concat":
        return [name for name, copied in zip(op.inputs, op.key.copies, strict=True) if copied]
    return ()


def _is_supported(op: Op) -> bool:
    return op.key.kind in (*_COMPUTES, *_CONVERTS) and op.key.precision != "fp8"


def _clip(op: Op, model: Model, input_range: tuple[float, float]) -> tuple[float, float] | None:
    """The real clip of what an operation writes."""
    node = model.graph.by_name.get(op.name)
    if node is None or op.key.kind in rescale.MOVES:
        # Conversions, which are named after a node and what they do, clip nothing of their own.
        return None
    return input_range if node.op == "input" else node.clip


def _union(clips: Sequence[tuple[float, float] | None]) -> tuple[float, float] | None:
    known = [clip for clip in clips if clip is not None]
    if len(known) < len(clips) or not known:
        return None
    return min(clip[0] for clip in known), max(clip[1] for clip in known)


def _value(affine: Affine, members: list[str], clip: tuple[float, float] | None, replaceable: bool) -> dict[str, Any]:
    name, wide = members[0].rsplit(":", 1)[0], affine
    if replaceable:
        wide = affine_from_range(name, *_wide_range(affine, clip))
    ends = None if clip is None else [None if np.isinf(end) else float(end) for end in clip]
    row: dict[str, Any] = {"name": name, "clip": ends, "replaceable": replaceable}
    row |= {"scale": float(affine.scale), "zero_point": affine.zero_point}
    return row | {"wide_scale": float(wide.scale), "wide_zero_point": wide.zero_point}


def _wide_range(affine: Affine, clip: tuple[float, float] | None) -> tuple[float, float]:
    """A range that reaches `WIDENING` times as far as a value's, beyond both ends or the one that no clip bounds.

    What is bounded at both ends, a clipped value or the input, is seen whole, if its bounds are not much further away.
    """
    scale, zero_point = float(affine.scale), affine.zero_point
    low, high, span = -zero_point * scale, (rescale.QMAX - zero_point) * scale, rescale.QMAX * scale
    least, most = (-np.inf, np.inf) if clip is None else clip
    if most - least <= WIDENING * WIDENING * span:
        return min(low, least), max(high, most)
    bounded = (low <= least) + (high >= most)
    further = span * (WIDENING - 1) / (1 if bounded else 2)
    return min(low, max(low - further, least)), max(high, min(high + further, most))


def _operation(
    op: Op, number: Mapping[str, int], clip: tuple[float, float] | None, model: Model, arrays: dict[str, list[np.ndarray]]
) -> dict[str, Any]:
    key, node = op.key, model.graph.by_name.get(op.name)
    row: dict[str, Any] = {"name": op.name, "kind": key.kind, "inputs": [number.get(name, -1) for name in op.inputs]}
    row |= {"output": number.get(op.output.name, -1), "window": int(np.prod(key.pool.kernel)), "constants": {}}
    row["integer"] = key.kind == "conv2d" and PRECISIONS[key.precision or ""].is_integer
    row["rounds"] = op.output.dtype == "uint8" and "integers" in op.constants and key.kind not in rescale.MOVES
    # The input's range bounds what it can be; it is not clipped to it.
    clipped = node is not None and node.op != "input" and clip is not None
    row["clip"] = [float(end) for end in clip] if clipped and clip is not None else None
    if key.kind == "lookup":
        row["function"] = (node.activation if node is not None else "") or ""
    if "clip_high" in op.constants and node is not None and node.clip_high:
        row["high"] = append_array(arrays["high"], model.parameters.constants[node.clip_high].astype(np.float32))
    return row


def append_array(parts: list[np.ndarray], array: np.ndarray) -> list[int]:
    """Put an array behind others; where it starts and how long it is."""
    parts.append(array)
    return [sum(map(len, parts[:-1])), len(array)]


def lookup_tables(record: dict[str, Any], scales: Sequence[tuple[float, int]]) -> dict[int, np.ndarray]:
    """Every table under some scales, uint8, flat, by the operation's number in the record."""
    tables = {}
    for number, op in enumerate(record["ops"]):
        if op["kind"] == "pixels":
            affine = Affine(np.float32(scales[op["output"]][0]), scales[op["output"]][1])
            tables[number] = quantized_pixels(record["arrays"]["normalised"], affine).ravel()
        elif op["kind"] == "lookup":
            given, made = (Affine(np.float32(scale), zero) for scale, zero in (scales[op["inputs"][0]], scales[op["output"]]))
            tables[number] = lookup_table(op["function"], op["clip"], given, made)
    return tables
