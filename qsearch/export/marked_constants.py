"""Where the constants that scales determine lie in an exported module, and in which order its kernels read them.

A module that is exported is linked with marks in place of these constants: unlike contents, which the compiler cannot
merge, and which are found in the file afterwards. Then the constants themselves are written over the marks, as others
are later (see `rescale`): what was exported has gone the way that a replacement goes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qsearch.build.relax_module import Call, Constant
from qsearch.errors import BundleError
from qsearch.export.scales_record import append_array
from qsearch.quantize.program import Op

__all__ = ["MarkedModule", "mark_constants"]

# Constants that scales determine, in all kinds.
_CONSTANTS = ("bias", "multiplier", "clip_high", "integers", "floats", "zero_points", "multipliers", "table")
_PER_CHANNEL = ("bias", "multiplier", "clip_high")


@dataclass(frozen=True)
class MarkedModule:
    """Kernel calls with marks for constants.

    Attributes:
        record: Of the program, its constants described but for their places.
        calls: For the linker.
        marks: (number of the record's operation, name of the constant) -> its mark and what it stands for.
    """

    record: dict[str, Any]
    calls: list[Call]
    marks: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]

    def located(self, module: bytes) -> tuple[dict[str, Any], bytes]:
        """Find the marks in a module's file and write the constants over them.

        Args:
            module: Bytes of the linked file.

        Returns:
            The record with places, and the module as it is to be.

        Raises:
            BundleError: A mark is not there, or is there twice.
        """
        record, made = copy.deepcopy(self.record), bytearray(module)
        for (number, name), (mark, array) in self.marks.items():
            # A constant is written after its length in bytes.
            wanted = np.int64(mark.nbytes).tobytes() + mark.tobytes()
            at = module.find(wanted)
            if at < 0 or module.find(wanted, at + 1) >= 0:
                raise BundleError(
                    f"constant {name} of {record['ops'][number]['name']} is not once in the module: a defect of qsearch"
                )
            start = at + 8
            record["ops"][number]["constants"][name]["at"] = start
            made[start : start + array.nbytes] = np.ascontiguousarray(array).tobytes()
        return record, bytes(made)


def mark_constants(record: dict[str, Any], calls: Sequence[tuple[Op, Call]]) -> MarkedModule:
    """Put marks in place of constants, and describe in a record how kernels read them.

    Args:
        record: By `describe_scales`.
        calls: Of `Linker.calls`.
    """
    record = copy.deepcopy(record)
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
            row["sums"] = append_array(record["parts"]["sums"], _weight_sums(op))
        for name, index in indices.items():
            array = call.arguments[index]
            assert isinstance(array, Constant)
            mark = random.integers(0, 256, array.bytes, np.uint8).view(array.array.dtype).reshape(array.array.shape)
            marks[numbers[position], name] = mark, array.array
            arguments[index] = Constant(mark)
        made.append(replace(call, arguments=tuple(arguments)))
    parts = record.pop("parts") | {"lanes": lanes.parts}
    normalised = parts.pop("normalised")
    dtypes = {"sums": np.int32, "high": np.float32, "lanes": np.int32}
    record["arrays"] = {name: np.concatenate([*found, np.zeros(0)]).astype(dtypes[name]) for name, found in parts.items()}
    if normalised:
        record["arrays"]["normalised"] = normalised[0]
    for row in record["ops"]:
        del row["position"]
    return MarkedModule(record, made, marks)


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
            self.places[content.tobytes()] = append_array(self.parts, content)
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
        elif not np.array_equal(packed[index], probe.ravel()):
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
