"""Record of a bundle's scales: what its constants are made of, and where each lies in the module's file.

A module that is exported is linked with marks in place of the constants that scales determine: unlike contents, which
the compiler cannot merge, and which are found in the file afterwards. Then the constants themselves are written over
the marks, by the very function that writes others later (see `rescale`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qsearch.build.relax_module import Call, Constant
from qsearch.errors import BundleError
from qsearch.export import rescale
from qsearch.models.graph import Model
from qsearch.qtype import PRECISIONS
from qsearch.quantize.affine import Affine, affine_from_range
from qsearch.quantize.lookup import lookup_table
from qsearch.quantize.program import Op, Program

__all__ = ["MarkedModule", "describe_scales", "lookup_tables", "mark_constants"]

# How much wider the ranges are of the module that statistics are recorded with; less where a clip ends before.
WIDENING = 4.0
# What operations between uint8 values can be given other scales.
_KINDS = ("conv2d", "add", "mul", "concat", "avg_pool2d", "max_pool2d", "gather", "lookup", "activation")
_KINDS += ("quantize", "dequantize", "requantize", "to_channels_last", "to_channels_first")
# Constants that scales determine, in all kinds.
_CONSTANTS = ("bias", "multiplier", "clip_high", "integers", "floats", "zero_points", "multipliers", "table")
_PER_CHANNEL = ("bias", "multiplier", "clip_high")


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


def describe_scales(program: Program, model: Model, input_range: tuple[float, float]) -> dict[str, Any]:
    """Everything of the record but the places in a module's file.

    Args:
        program: The program.
        model: What it was lowered from.
        input_range: (low, high) that preprocessed images can have.

    Returns:
        values: of all that share a scale, `name`, `scale`, `zero_point`, `wide_scale`, `wide_zero_point`, `clip`, `replaceable`;
        ops: those that read or write what is replaceable, see `rescale.rescaled`; arrays.
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
    return op.key.kind in _KINDS and op.key.precision != "fp8"


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
    """A range that reaches `WIDENING` times as far as a value's, beyond both ends or the one that no clip bounds."""
    scale, zero_point = float(affine.scale), affine.zero_point
    low, high, span = -zero_point * scale, (rescale.QMAX - zero_point) * scale, rescale.QMAX * scale
    least, most = (-np.inf, np.inf) if clip is None else clip
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
        row["high"] = _append(arrays["high"], model.parameters.constants[node.clip_high].astype(np.float32))
    return row


def _append(parts: list[np.ndarray], array: np.ndarray) -> list[int]:
    """Put an array behind others; where it starts and how long it is."""
    parts.append(array)
    return [sum(map(len, parts[:-1])), len(array)]


def lookup_tables(record: dict[str, Any], scales: Sequence[tuple[float, int]]) -> dict[int, np.ndarray]:
    """The table of every lookup under some scales, by its number among the record's operations."""
    tables = {}
    for number, op in enumerate(record["ops"]):
        if op["kind"] == "lookup":
            given, made = (
                Affine(np.float32(scale), zero) for scale, zero in (scales[op["inputs"][0]], scales[op["output"]])
            )
            tables[number] = lookup_table(op["function"], op["clip"], given, made)
    return tables


@dataclass(frozen=True)
class MarkedModule:
    """Kernel calls with marks for constants.

    Attributes:
        calls: For the linker.
        marks: (number of the record's operation, name of the constant) -> its mark and what it stands for.
    """

    calls: list[Call]
    marks: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]

    def located(self, record: dict[str, Any], module: bytes) -> tuple[dict[str, Any], bytes]:
        """Find the marks in a module's file and write the constants over them.

        Args:
            record: Of the program, by `describe_scales`; `mark_constants` has completed it.
            module: Bytes of the linked file.

        Returns:
            The record with places, and the module as it is to be.

        Raises:
            BundleError: A mark is not there, or is there twice.
        """
        made = bytearray(module)
        for (number, name), (mark, array) in self.marks.items():
            # A constant is written after its length in bytes.
            wanted = np.int64(mark.nbytes).tobytes() + mark.tobytes()
            at = module.find(wanted)
            if at < 0 or module.find(wanted, at + 1) >= 0:
                raise BundleError(f"constant {name} of {record['ops'][number]['name']} is not once in the module: a defect of qsearch")
            start = at + 8
            record["ops"][number]["constants"][name]["at"] = start
            made[start : start + array.nbytes] = np.ascontiguousarray(array).tobytes()
        return record, bytes(made)


def mark_constants(record: dict[str, Any], calls: Sequence[tuple[Op, Call]]) -> MarkedModule:
    """Put marks in place of constants, and note in the record how kernels read them.

    Args:
        record: By `describe_scales`.
        calls: Of `Linker.calls`.
    """
    numbers = {row["position"]: number for number, row in enumerate(record["ops"])}
    random, marks, made = np.random.default_rng(0), {}, []
    lanes = _Lanes()
    position, previous = -1, None
    for place, (op, call) in enumerate(calls):
        position, previous = position + (op is not previous), op
        if position not in numbers:
            made.append(call)
            continue
        row = record["ops"][numbers[position]]
        row["call"] = place
        arguments = list(call.arguments)
        indices = _describe_constants(op, call, row, lanes)
        if row["integer"] and (row["offset"] or not _stays_zero(record["values"][row["inputs"][0]])):
            row["sums"] = _append(record["parts"]["sums"], _weight_sums(op))
        for name, index in indices.items():
            array = call.arguments[index]
            assert isinstance(array, Constant)
            mark = random.integers(0, 256, array.bytes, np.uint8).view(array.array.dtype).reshape(array.array.shape)
            marks[numbers[position], name] = mark, array.array
            arguments[index] = Constant(mark)
        made.append(replace(call, arguments=tuple(arguments)))
    parts = record.pop("parts") | {"lanes": lanes.parts}
    dtypes = {"sums": np.int32, "high": np.float32, "lanes": np.int32}
    record["arrays"] = {name: np.concatenate([*found, np.zeros(0)]).astype(dtypes[name]) for name, found in parts.items()}
    for row in record["ops"]:
        del row["position"]
    return MarkedModule(made, marks)


def _weight_sums(op: Op) -> np.ndarray:
    """Sum of every output channel's integer weights, int64 (O,)."""
    weight = op.constants["weight"]
    return np.asarray(weight.reshape(len(weight), -1).sum(1, dtype=np.int64))


def _stays_zero(value: dict[str, Any]) -> bool:
    """Whether a value's zero point is zero under whatever scale: nothing in it is negative."""
    return value["zero_point"] == 0 and (not value["replaceable"] or (value["clip"] is not None and value["clip"][0] == 0.0))


@dataclass
class _Lanes:
    """Orders in which kernels read channels, each kept once."""

    parts: list[np.ndarray] = field(default_factory=list)
    places: dict[bytes, list[int]] = field(default_factory=dict)

    def place(self, lanes: np.ndarray) -> list[int]:
        """Where an order starts and how long it is."""
        content = lanes.astype(np.int32)
        if content.tobytes() not in self.places:
            self.places[content.tobytes()] = _append(self.parts, content)
        return self.places[content.tobytes()]


def _describe_constants(op: Op, call: Call, row: dict[str, Any], lanes: _Lanes) -> dict[str, int]:
    """Note how a kernel reads each constant; name -> index of the argument that holds it.

    Found by packing numbers that tell the places apart, whatever the kernel.
    """
    names = [name for name in _CONSTANTS if name in op.constants]
    blank = {name: np.zeros_like(array) for name, array in op.constants.items()}
    first = len(op.inputs) + (call.kernel.pack_weight is not None)
    actual, found = call.kernel.pack(op.constants), {}
    for name in names:
        probe = (np.arange(blank[name].size) % 255 + 1 if name == "table" else np.arange(blank[name].size) + 1).astype(
            blank[name].dtype
        )
        packed = call.kernel.pack(blank | {name: probe})
        changed = [index for index, array in enumerate(packed) if array.any()]
        if not changed:
            continue
        (index,) = changed
        place = {"count": int(packed[index].size), "dtype": packed[index].dtype.str}
        if name in _PER_CHANNEL:
            place["lanes"] = lanes.place(packed[index])
            if name == "bias":
                row["offset"] = _offset(op, packed[index].astype(np.int64), actual[index]) if row["integer"] else 0
        elif not np.array_equal(packed[index], probe):
            raise BundleError(f"{op.name}: its kernel reads {name} in an order of its own: a defect of qsearch")
        row["constants"][name], found[name] = place, first + index
    return found


def _offset(op: Op, lanes: np.ndarray, packed: np.ndarray) -> int:
    """What kernels without instructions for mixed signs add to an input; the sums of weights so many times are in the bias."""
    sums = _weight_sums(op)
    used, channels = lanes > 0, lanes[lanes > 0] - 1
    added = packed[used].astype(np.int64) - op.constants["bias"][channels]
    heavy = np.flatnonzero(sums[channels])
    offset = int(added[heavy[0]] // sums[channels][heavy[0]]) if len(heavy) else 0
    if (added != offset * sums[channels]).any():
        raise BundleError(f"{op.name}: its kernel holds biases in a form of its own: a defect of qsearch")
    return offset
