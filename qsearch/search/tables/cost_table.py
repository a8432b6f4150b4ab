"""The cost table: what every layer costs at every precision, and every pair of neighbours at every two.

A configuration's kernels are known without building it, and each distinct kernel is timed once; their sum is the
configuration's predicted latency, boundaries and all. For the planner that sum is split into terms of single
layers and of pairs (`cost_fit`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qsearch.build.link import CompiledModule, Linker, PlannedCall
from qsearch.errors import BuildError
from qsearch.measure.gpu_kernel_times import time_gpu_kernels
from qsearch.measure.kernel_times import KernelTimes, time_kernels
from qsearch.models.graph import Graph
from qsearch.quantize.program import OpKey, Program
from qsearch.search.tables.cost_fit import covering, fit_costs, pairs_around
from qsearch.search.tables.pairwise import PairwiseSum

__all__ = ["Cost", "CostRequest", "CostTable", "measure_costs"]


@dataclass(frozen=True)
class Cost:
    """Predicted cost of a configuration.

    Attributes:
        latency_ms: Sum of its kernels' times.
        peak_bytes: As `Memory.peak_bytes`, exact.
    """

    latency_ms: float
    peak_bytes: int


@dataclass(frozen=True)
class CostRequest:
    """What a cost table is made of.

    Attributes:
        graph: The layer graph.
        layers: Layer -> its precisions, in the order of the variables.
        lower: Assignment, int (variables,) -> program.
        linker: Names kernels and plans memory.
        build: Links a program; fails it with a BuildError.
        image: What the modules are run on, float32 (N, C, H, W).
        reference: The float module, which trials are timed in turns with.
        reference_ms: Its latency, on whose clock theirs are told, milliseconds.
        seed: Of the sampled configurations.
        known: Symbol -> seconds of a kernel on a device that is not here; None to time kernels on this machine.
    """

    graph: Graph
    layers: Mapping[str, tuple[str, ...]]
    lower: Callable[[np.ndarray], Program]
    linker: Linker
    build: Callable[[Program], CompiledModule]
    image: np.ndarray
    reference: Program
    reference_ms: float
    seed: int = 0
    known: Callable[[str], float | None] | None = None


@dataclass(frozen=True)
class CostTable:
    """Costs of configurations.

    Attributes:
        latency: Milliseconds as a pairwise sum over layers.
        weight_bytes: Bytes of constants as a pairwise sum over layers.
        linker: Names kernels and plans memory.
        clock: Times of kernels.
        scale: From the clock of the kernels' times, which may be of another day, to that of the trials.
    """

    latency: PairwiseSum
    weight_bytes: PairwiseSum
    linker: Linker
    clock: KernelClock
    scale: float = 1.0

    def cost(self, program: Program) -> Cost:
        """Cost of a lowered configuration, from its own kernels."""
        plan = self.linker.plan(program)
        latency_ms = 1e3 * self.scale * sum(self.clock.seconds(call) for call in plan.calls)
        held = plan.arena_bytes + program.input.bytes + program.output.bytes
        return Cost(latency_ms, plan.weight_bytes + held + plan.workspace_bytes)


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
    return [(*shape, key.precision, key.dtypes), (*shape, key.precision, key.residual), (*shape, key.precision), shape]


def measure_costs(request: CostRequest, progress: Callable[[str], None] = lambda clause: None) -> CostTable:
    """Make the cost table; kernels that are in the cache with their times are not timed again.

    Args:
        request: What it is made of.
        progress: Called whenever a slow step begins, and with what is left out.

    Raises:
        BuildError: The reference does not build; a mixed configuration that does not is left out.
    """
    rng, linker = np.random.default_rng(request.seed), request.linker
    programs = [
        request.reference,
        *(request.lower(row) for row in covering(_sizes(request), pairs_around(request.graph, request.layers), rng)),
    ]
    # The reference is often one of the others too; the first of them stands for both.
    plans: dict[tuple[str, ...], tuple[Program, Sequence[PlannedCall]]] = {}
    for one in programs:
        calls = linker.plan(one).calls
        plans.setdefault(tuple(call.symbol for call in calls), (one, calls))
    clock = _timed(request, list(plans.values()), progress)
    nodes = {node.name for node in request.graph.nodes}

    def node_costs(row: np.ndarray) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for call in linker.plan(request.lower(row)).calls:
            # Conversions are called after the node whose value they convert.
            name = call.op.name if call.op.name in nodes else call.op.name.rpartition(".")[0]
            found[name] = found.get(name, np.zeros(2)) + (1e3 * clock.seconds(call), call.constant_bytes)
        return found

    progress("splitting their costs into those of layers and neighbours")
    latency, weight_bytes = fit_costs(request.graph, request.layers, node_costs, 2, rng)
    scale = request.reference_ms / (1e3 * sum(clock.seconds(call) for call in linker.plan(request.reference).calls))
    return CostTable(latency.scaled(scale), weight_bytes, linker, clock, scale)


def _timed(
    request: CostRequest, plans: Sequence[tuple[Program, Sequence[PlannedCall]]], progress: Callable[[str], None]
) -> KernelClock:
    """A clock that knows the kernels of some programs; those that have a kernel without a time are run."""
    linker, times = request.linker, KernelTimes(request.linker.cache.directory)
    clock = KernelClock(times if request.known is None else GivenTimes(request.known))
    unknown = [one for one, calls in plans if any(clock.times.get(call.symbol) is None for call in calls)]
    if unknown and request.known is not None:
        progress(f"{len(unknown)} of {len(plans)} mixed configurations have kernels without a time, which the planner guesses")
    elif unknown:
        progress(f"building and timing {len(unknown)} mixed configurations for the cost table")
        modules = _built(request, unknown, progress)
        if modules:
            on_gpu = linker.target.device == "cuda"
            found = (
                time_gpu_kernels(linker, [module.program for module in modules])
                if on_gpu
                else time_kernels(modules, request.image, linker.target.threads)
            )
            times.put(_new_times(found, times))
    for _, calls in plans:
        for call in calls:
            clock.learn(call)
    return clock


def _built(request: CostRequest, programs: Sequence[Program], progress: Callable[[str], None]) -> list[CompiledModule]:
    """The programs that can be built: a kernel that does not compile fails trials that have it, not the search."""
    modules: list[CompiledModule] = []
    failed: dict[str, int] = {}
    for one in programs:
        try:
            modules.append(request.build(one))
        except BuildError as error:
            if one is request.reference:
                raise
            failed[str(error)] = failed.get(str(error), 0) + 1
    for reason, count in failed.items():
        progress(f"{count} of them cannot be built, so the cost table does without: {reason}")
    return modules


def _new_times(found: Mapping[str, float], known: KernelTimes) -> dict[str, float]:
    """Times of kernels that had none, told on the clock of those that had.

    The machine may have been faster or slower when the others were timed; those that were timed both times tell by how
    much.
    """
    before = {symbol: seconds for symbol in found if (seconds := known.get(symbol)) is not None}
    ratio = float(np.median([seconds / found[symbol] for symbol, seconds in before.items()])) if before else 1.0
    return {symbol: ratio * seconds for symbol, seconds in found.items() if symbol not in before}


def _sizes(request: CostRequest) -> list[int]:
    return [len(precisions) for precisions in request.layers.values()]
