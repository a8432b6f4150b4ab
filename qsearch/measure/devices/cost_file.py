"""Read a cost table: times of kernels that a pack was measured to have on some device."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsearch.bounded import parse_json, read_file, shortened
from qsearch.errors import UsageError
from qsearch.measure.devices.pack_runner import SCHEMA

__all__ = ["CostFile", "KernelTime", "read_cost_file"]

# A tile must be this much faster than the predicted one: less is noise.
LEAST_GAIN = 1.03
# No call is taken to be faster than this share of the kernel's own time.
LEAST_SHARE = 0.1
# A kernel takes less than a thousand.
MOST_BYTES = 1 << 27
MOST_TILE = 1 << 12


@dataclass(frozen=True)
class KernelTime:
    """One kernel's record: seconds of a call and half their interquartile range; None, None where it was wrong."""

    seconds: float | None
    spread: float | None
    what: str
    operation: str
    tile: Mapping[str, Any] | None
    tile_group: str


@dataclass(frozen=True)
class CostFile:
    """A cost table.

    Attributes:
        path: Where it was read.
        digest: SHA-256 of its content.
        device: What the device calls itself.
        target: As the pack says it: name, description, threads and others.
        model: What was packed.
        made_by: Version of qsearch that made the pack.
        overhead_s: What a call adds in a module, beyond the same call by itself; may be negative.
        inference_s: What an inference takes besides its calls.
        kernels: Symbol -> record.
    """

    path: Path
    digest: str
    device: str
    target: Mapping[str, Any]
    model: str
    made_by: str
    overhead_s: float
    inference_s: float
    kernels: Mapping[str, KernelTime]

    def seconds(self, symbol: str) -> float | None:
        """What a call of a kernel adds to a module's latency; None where it was not measured, or wrong."""
        found = self.kernels.get(symbol)
        if found is None or found.seconds is None:
            return None
        return max(found.seconds + self.overhead_s, LEAST_SHARE * found.seconds)

    def tiles(self) -> dict[str, Mapping[str, Any]]:
        """Name of what shares a tile -> the tile with the least time over all its operations, the first unless another gains."""
        groups: dict[str, dict[tuple, dict[str, float]]] = {}
        operations: dict[str, set[str]] = {}
        for one in self.kernels.values():
            if one.tile is None:
                continue
            operations.setdefault(one.tile_group, set()).add(one.operation)
            times = groups.setdefault(one.tile_group, {}).setdefault(_fields(one.tile), {})
            if one.seconds is not None:
                times[one.operation] = one.seconds
        chosen: dict[str, Mapping[str, Any]] = {}
        for group, tiles in groups.items():
            whole = {tile: sum(times.values()) for tile, times in tiles.items() if set(times) == operations[group]}
            if whole:
                first, best = next(iter(whole)), min(whole, key=lambda tile: whole[tile])
                chosen[group] = dict(best if whole[first] >= LEAST_GAIN * whole[best] else first)
        return chosen


def _fields(tile: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """A tile's fields; JSON makes a list of a tuple."""
    return tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in tile.items())


def read_cost_file(path: Path) -> CostFile:
    """Read a cost table.

    Raises:
        UsageError: It cannot be read, or is none.
    """
    how = "give the table that measure-pack, or the pack itself, wrote"
    try:
        data = read_file(path, MOST_BYTES)
        document = parse_json(data)
        if document["schema"] != SCHEMA:
            raise UsageError(
                f"cost table {path} has schema {shortened(document['schema'])}, this qsearch reads {SCHEMA}: measure a new pack"
            )
        kernels = {symbol: _kernel(record) for symbol, record in document["kernels"].items()}
        overhead_s, inference_s = float(document["call"]["overhead_seconds"]), float(document["inference_seconds"])
        if not math.isfinite(overhead_s + inference_s):
            raise ValueError("the times of a call and an inference are no numbers")
        target = document["target"]
        words = (str(document["device"]), target, str(document["model"]), str(document["made_by"]["qsearch"]))
        _ = target["name"], target["description"], int(target["threads"])
    except OSError as error:
        raise UsageError(f"cost table {path} cannot be read: {error.strerror}; {how}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UsageError(f"{path} is no cost table ({type(error).__name__}: {str(error)[:200]}); {how}") from error
    return CostFile(path, hashlib.sha256(data).hexdigest(), *words, overhead_s, inference_s, kernels)


def _kernel(record: Mapping[str, Any]) -> KernelTime:
    seconds, spread = (float(record["seconds"]), float(record["spread"])) if record["exact"] else (None, None)
    if seconds is not None and spread is not None and not 0 <= seconds + spread < math.inf:
        raise ValueError(f"a kernel takes {seconds} s, and {spread} s more or less")
    tile = record["tile"]
    numbers = (
        [] if tile is None else [one for _, value in _fields(tile) for one in (value if isinstance(value, tuple) else (value,))]
    )
    if not all(type(one) in (bool, str) or (type(one) is int and 0 <= one <= MOST_TILE) for one in numbers):
        raise ValueError(f"{shortened(tile)} is no register tile")
    words = (str(record["what"]), str(record["operation"]), tile, str(record["tile_group"]))
    return KernelTime(seconds, spread, *words)
