"""A device that is not here: latency is the sum of what its kernels took when a pack was measured there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qsearch.build.link import Linker, PlannedCall
from qsearch.build.object_cache import cache_for
from qsearch.build.target import Target
from qsearch.errors import BuildError, UsageError
from qsearch.measure.devices.cost_file import CostFile
from qsearch.measure.devices.device import Prepared
from qsearch.measure.latency import TimingSettings
from qsearch.measure.measurement import Latency
from qsearch.quantize.program import Program

__all__ = ["ModelledDevice", "PackAway"]

# Kernels that a message names.
NAMED = 3


@dataclass(frozen=True)
class ModelledDevice:
    """Tells what was computed when a module was got ready; a handle is its latency."""

    def handle(self, prepared: Prepared) -> Any:
        """Its latency."""
        return prepared.away

    def alone(self, handle: Latency, image: np.ndarray, settings: TimingSettings) -> Latency:
        """The latency."""
        return handle

    def paired(self, reference: Latency, handles: Sequence[Latency], image: np.ndarray, reference_ms: float) -> list[Latency]:
        """The latencies; there is no clock that drifts."""
        return list(handles)


class PackAway:
    """A target whose kernels were measured elsewhere.

    Args:
        table: Their times.
        target: What they were compiled for.
        folder: Where kernels are kept.

    Raises:
        UsageError: The table is of another target.
    """

    def __init__(self, table: CostFile, target: Target, folder: Path) -> None:
        if table.target["description"] != target.description:
            raise UsageError(
                f"cost table {table.path} is of target {table.target['name']!r} ({table.target['description']}), not of "
                f"{target.name!r} ({target.description}): leave --target and --threads out, or measure a pack of that target"
            )
        self.table, self.target = table, target
        self.linker = Linker(cache_for(folder, target))
        try:
            self.linker.tiles.hold(table.tiles())
        except TypeError as error:
            raise UsageError(f"{table.path} is no cost table: a kernel has a tile of other fields ({error})") from error
        self.device = ModelledDevice()
        self.description = f"{table.device}, by kernel times of cost table {table.digest[:16]}"

    def prepare(self, program: Program) -> Latency:
        """The latency of a program: what its calls add up to.

        Raises:
            BuildError: A kernel has no time.
        """
        calls = self.linker.plan(program).calls
        self._require(calls)
        seconds = self.table.inference_s + sum(self.table.seconds(call.symbol) or 0.0 for call in calls)
        spreads = (self.table.kernels[call.symbol].spread or 0.0 for call in calls)
        spread = math.sqrt(sum(one * one for one in spreads))
        return Latency(1e3 * seconds, 1e3 * spread, 0, 0, self.target.threads, source="modelled")

    def require(self, program: Program) -> None:
        """Refuse a table that lacks kernels that every search needs.

        Raises:
            UsageError: It does.
        """
        try:
            self._require(self.linker.plan(program).calls)
        except BuildError as error:
            raise UsageError(str(error)) from error

    def learn(self, programs: Iterable[Program]) -> None:
        """Nothing: the device is not here."""

    def seconds(self, symbol: str) -> float | None:
        """As the table has it."""
        return self.table.seconds(symbol)

    def _require(self, calls: Sequence[PlannedCall]) -> None:
        table = self.table
        missing = {call.symbol: call for call in calls if table.seconds(call.symbol) is None}
        if not missing:
            return
        wrong = [table.kernels[symbol].what for symbol in missing if symbol in table.kernels]
        if wrong:
            raise BuildError(
                f"{len(wrong)} kernels are wrong on {table.device}, so they have no time: {'; '.join(wrong[:NAMED])}"
            )
        names = [
            f"{call.op.key.kind} {call.op.key.precision or ''} of {call.op.name} ({symbol})" for symbol, call in missing.items()
        ]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise BuildError(
            f"cost table {table.path} (of {table.model}, made by qsearch {table.made_by}) has no time of {len(names)} of the "
            f"{len(calls)} kernels: {'; '.join(names[:NAMED])}{more}. Pack the kernels of this model and space and measure them "
            f"on the device: qsearch pack --model MODEL --space SPACE --target {table.target['name']} --out kernels.pack, then "
            "python kernels.pack --out table.json there"
        )
