"""Give a compiled module other scales and zero points by replacing constants in its file: NumPy is all it takes.

This file is copied into bundles and stands alone. Scales, zero points, biases and tables are data of the module, never
code; `scales.npz` says where each of them lies in `model.so`, in which order a kernel reads it, and what it is made of.
What a module computes with new constants is what `qsearch.quantize.program` defines, bit for bit.

A layer's bias is recomputed from the integers that are there, so that every replacement rounds it once more, by half a
step of its accumulator at most; everything else is computed from the scales as the compiler of the bundle does.
"""

from __future__ import annotations

import json

import numpy as np

RECORD = "scales.npz"
FORMAT, VERSION = "qsearch-scales", 1
# Positions in the argument vectors that every quantized kernel takes, as in `qsearch.quantize.program`.
INTEGERS = ("a_zero_point", "b_zero_point", "zero_point", "qmin", "qmax")
FLOATS = ("a_multiplier", "b_multiplier", "multiplier", "low", "high")
QMIN, QMAX = 0, 255
# Operations that read zero points of their operands; those of a concatenation are an array of their own.
CENTRED = ("conv2d", "add", "mul", "avg_pool2d", "dequantize", "requantize", "activation", "gather")
# Operations that pass scale and zero point on.
MOVES = ("max_pool2d", "gather", "to_channels_first")
# Operations that are a table; `pixels` has one for each channel.
TABLES = ("lookup", "pixels")
# Biases beyond this may leave the accumulator no room.
MAX_BIAS = 2**30


class ScaleProblem(Exception):
    """What is wrong with a record of scales, or with scales that are asked for."""


def read_record(path):
    """The record of a bundle: header, arrays.

    Raises:
        ScaleProblem: There is none, it is damaged, or is of another version.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        record = json.loads(arrays.pop("header").tobytes())
        found = record["format"], record["version"]
    except FileNotFoundError as error:
        raise ScaleProblem(f"{path} is missing: the bundle was exported without it; export it again") from error
    except Exception as error:  # zipfile, numpy and json raise a dozen kinds on bytes that are not theirs
        raise ScaleProblem(f"{path} is damaged ({type(error).__name__}); export the bundle again") from error
    if found != (FORMAT, VERSION):
        raise ScaleProblem(f"{path} has format {found[0]} {found[1]}, this reads {FORMAT} {VERSION}; export the bundle again")
    return record | {"arrays": arrays}


def write_record(path, record):
    """Write a record of scales."""
    header = json.dumps({name: value for name, value in record.items() if name != "arrays"}, separators=(",", ":"))
    np.savez_compressed(path, header=np.frombuffer(header.encode(), np.uint8), **record["arrays"])


def scales_of(record):
    """(scale, zero point) of every value, in the record's order."""
    return [(value["scale"], value["zero_point"]) for value in record["values"]]


def wide_scales_of(record):
    """(scale, zero point) of every value in the module that statistics are recorded with."""
    return [(value["wide_scale"], value["wide_zero_point"]) for value in record["values"]]


def wide_tables_of(record):
    """Tables of that module, by the number of the operation."""
    found, start = {}, 0
    for number, op in enumerate(record["ops"]):
        if op["kind"] in TABLES:
            count = op["constants"]["table"]["count"]
            found[number] = record["arrays"]["wide_tables"][start : start + count]
            start += count
    return found


def with_scales(record, module, scales, tables):
    """A module's bytes with other scales.

    Args:
        record: Of the module.
        module: Its bytes.
        scales: (scale, zero point) of every value, in the record's order.
        tables: Number of an operation that is a table -> it under these scales, uint8, flat.

    Returns:
        Bytes of the same length.

    Raises:
        ScaleProblem: Scales that the module cannot have.
    """
    made, before = bytearray(module), scales_of(record)
    for number, op in enumerate(record["ops"]):
        values = [*op["inputs"], op["output"]]
        if all(value < 0 or before[value] == scales[value] for value in values):
            continue
        known = known_of(record, op) | {"table": tables.get(number)}
        for name, array in rescaled(op, unpacked(record, module, op), before, scales, known).items():
            if (place := op["constants"].get(name)) is not None:
                packed = _packed(record, op, place, array, known.get("sums") if name == "bias" else None)
                made[place["at"] : place["at"] + packed.nbytes] = packed.tobytes()
    return bytes(made)


def known_of(record, op):
    """What is known of a layer's output channels: sums of weights, int64 (O,), and real high ends of clips, float32 (O,)."""
    known = {}
    for name in ("sums", "high"):
        if name in op:
            start, count = op[name]
            known[name] = record["arrays"][name][start : start + count]
    if "sums" in known:
        known["sums"] = known["sums"].astype(np.int64)
    return known


def unpacked(record, module, op):
    """The constants of an operation as they lie in a module, in the order of its channels."""
    found = {}
    for name, place in op["constants"].items():
        packed = np.frombuffer(module, place["dtype"], place["count"], place["at"])
        if "lanes" not in place:
            found[name] = packed.copy()
            continue
        lanes = _lanes(record, place)
        array = np.zeros(lanes.max(), packed.dtype)
        array[lanes[lanes > 0] - 1] = packed[lanes > 0]
        if name == "bias" and op["offset"]:
            array -= (op["offset"] * known_of(record, op)["sums"]).astype(array.dtype)
        found[name] = array
    return found


def _packed(record, op, place, array, sums):
    if "lanes" in place:
        lanes = _lanes(record, place)
        if sums is not None:
            array = array + op["offset"] * sums
        array = np.where(lanes > 0, array[lanes - 1], 0)
    return np.ascontiguousarray(array, place["dtype"])


def _lanes(record, place):
    """Which channel each place of a packed array holds, counted from one; zero for none."""
    start, count = place["lanes"]
    return record["arrays"]["lanes"][start : start + count].astype(np.int64)


def rescaled(op, constants, before, after, known):
    """The constants of an operation under other scales.

    Args:
        op: kind, inputs and output (numbers of values, -1 for what has no scale), integer (a layer that sums integers),
            rounds (the output is uint8, written here), clip (low, high) or None, window (elements of a pooling).
        constants: Those under the scales before.
        before: (scale, zero point) of every value.
        after: The same of what is wanted.
        known: sums and high, see `known_of`; table, of an operation that is one.

    Returns:
        The constants that there are, by name.

    Raises:
        ScaleProblem: A bias leaves its accumulator no room.
    """
    if op["kind"] in TABLES:
        return {"table": known["table"]}
    made = {name: array.copy() for name, array in constants.items()}
    given = [(after[value] if value >= 0 else (1.0, 0)) for value in op["inputs"]]
    unit, zero_point = after[op["output"]] if op["output"] >= 0 else (1.0, 0)
    if op["kind"] in CENTRED:
        for place, value in enumerate(op["inputs"]):
            if value >= 0:
                made["integers"][place] = given[place][1]
    if op["rounds"]:
        made["integers"][2:] = zero_point, *_clip_bounds(op["clip"], unit, zero_point)
    if op["kind"] == "conv2d" and op["integer"]:
        made |= _layer(op, constants, before, after, known)
    if op["kind"] == "concat":
        made["multipliers"][:] = [np.float64(scale) / np.float64(unit) for scale, _ in given]
        made["zero_points"][:] = [zero for _, zero in given]
    elif op["kind"] not in MOVES:
        for name, value in _multipliers(op, [scale for scale, _ in given], unit).items():
            made["floats"][FLOATS.index(name)] = value
    if "high" in known:
        made["clip_high"] = _clip_high(known["high"], op["rounds"], unit, zero_point)
    return made


def _clip_bounds(clip, scale, zero_point):
    """The integers that a real clip maps to."""
    if clip is None:
        return QMIN, QMAX
    return tuple(int(np.clip(np.rint(np.float64(end) / np.float64(scale)) + zero_point, QMIN, QMAX)) for end in clip)


def _clip_high(high, rounds, scale, zero_point):
    if not rounds:
        return (high / np.float64(scale)).astype(np.float32)
    return (np.clip(np.rint(high / np.float64(scale)) + zero_point, QMIN, QMAX) - zero_point).astype(np.float32)


def _multipliers(op, scales, unit):
    """The scalar multipliers that an operation reads."""
    kind = op["kind"]
    if kind == "conv2d":
        second = {"b_multiplier": scales[1] / (unit if op["integer"] else 1.0)} if len(scales) > 1 else {}
        return second if op["integer"] else second | {"multiplier": 1 / unit}
    if kind == "add":
        return {"a_multiplier": np.float64(scales[0]) / unit, "b_multiplier": np.float64(scales[1]) / unit}
    if kind in ("dequantize", "requantize"):
        return {"a_multiplier": np.float64(scales[0]) / unit}
    multiplier = 1 / unit
    if kind == "mul":
        for scale in scales:
            multiplier *= scale
    elif kind == "avg_pool2d" and op["inputs"][0] >= 0:
        multiplier *= scales[0] / float(op["window"])
    return {"multiplier": multiplier} | ({"a_multiplier": scales[0]} if kind == "activation" else {})


def _layer(op, constants, before, after, known):
    """Bias and multiplier of a layer that sums integers; the input's zero point is folded into the bias."""
    (old, old_zero), (new, new_zero) = before[op["inputs"][0]], after[op["inputs"][0]]
    narrower = np.float64(old) / np.float64(new)
    # Sums are not kept where the input is never negative.
    sums = known.get("sums", np.zeros(1, np.int64))
    if "sums" not in known and (old_zero or new_zero):
        raise ScaleProblem(f"layer {op['name']} reads what is never negative: its zero point cannot be {new_zero}")
    real = (constants["bias"].astype(np.float64) + float(old_zero) * sums) * narrower
    bias = np.rint(real) - new_zero * sums
    if np.abs(bias).max(initial=0) > MAX_BIAS:
        raise ScaleProblem(f"layer {op['name']} cannot have the scale {new:g} at its input: its bias would overflow")
    units = [side[op["output"]][0] if op["output"] >= 0 else 1.0 for side in (before, after)]
    multiplier = constants["multiplier"].astype(np.float64) / narrower * (np.float64(units[0]) / np.float64(units[1]))
    return {"bias": bias.astype(np.int32), "multiplier": multiplier.astype(np.float32)}
