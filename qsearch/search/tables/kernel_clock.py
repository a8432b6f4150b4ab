"""Costs of programs by the times of their kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from qsearch.build.link import Linker, PlannedCall
from qsearch.measure.kernel_times import KernelTimes
from qsearch.quantize.program import OpKey, Program
from qsearch.search.tables.cost import Cost

__all__ = ["CostModel", "GivenTimes", "KernelClock"]


@dataclass(frozen=True)
class GivenTimes:
    """Times that were measured elsewhere: `get` is symbol -> seconds of one call, None where it has none."""

    get: Callable[[str], float | None]


@dataclass
class KernelClock:
    """Seconds of kernels; of those that no measured network had, the mean of their kin.

    Attributes:
        times: What was measured.
    """

    times: KernelTimes | GivenTimes
    _kin: dict[tuple, list[float]] = field(default_factory=dict)

    def learn(self, call: PlannedCall) -> None:
        """Take note of a measured kernel."""
        seconds = self.times.get(call.symbol)
        if seconds is not None:
            for kin in _kinships(call.op.key):
                self._kin.setdefault(kin, []).append(seconds)

    def seconds(self, call: PlannedCall) -> float:
        """Seconds of one call; 0 where nothing like it was measured."""
        found = self.times.get(call.symbol)
        if found is not None:
            return found
        return next((float(np.mean(self._kin[kin])) for kin in _kinships(call.op.key) if kin in self._kin), 0.0)


def _kinships(key: OpKey) -> list[tuple]:
    """What kernels may share, the closest kinship first."""
    shape = (key.kind, key.shapes[0], key.shapes[-1], key.conv, key.pool)
    held = (*shape, key.precision, key.weight_group, key.weight_offset)
    return [(*held, key.dtypes), (*held, key.residual), held, (*shape, key.precision), shape]


@dataclass(frozen=True)
class CostModel:
    """Costs of programs by their kernels.

    Attributes:
        linker: Names kernels and plans memory.
        clock: Times of kernels.
        scale: From the clock of the kernels' times, which may be of another day, to that of the trials.
    """

    linker: Linker
    clock: KernelClock
    scale: float = 1.0

    def cost(self, program: Program) -> Cost:
        """Cost of a lowered configuration, from its own kernels."""
        plan = self.linker.plan(program)
        latency_ms = 1e3 * self.scale * sum(self.clock.seconds(call) for call in plan.calls)
        held = plan.arena_bytes + program.input.bytes + program.output.bytes
        return Cost(latency_ms, plan.weight_bytes + held + plan.workspace_bytes)
