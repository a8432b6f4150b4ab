"""The cost table: what every layer costs at every precision, and every pair of neighbours at every two.

A configuration's kernels are known without building it, and each distinct kernel is timed once; their sum is the
configuration's predicted latency, boundaries and all. For the planner that sum is split into terms of single
layers and of pairs (`cost_fit`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qsearch.build.link import CompiledModule, Linker, PlannedCall
from qsearch.errors import BuildError
from qsearch.measure.gpu_kernel_times import time_gpu_kernels
from qsearch.measure.kernel_times import KernelTimes, time_kernels
from qsearch.models.graph import Graph
from qsearch.quantize.program import Program
from qsearch.search.tables.cost_fit import covering, fit_costs, pairs_around
from qsearch.search.tables.kernel_clock import CostModel, GivenTimes, KernelClock
from qsearch.search.tables.pairwise import PairwiseSum

__all__ = ["CostRequest", "CostTable", "measure_costs", "measure_uniform", "uniform_programs"]


@dataclass(frozen=True)
class CostRequest:
    """What a cost table is made of.

    Attributes:
        graph: The layer graph.
        layers: Layer -> its precisions, in the order of the variables.
        lower: Assignment, int (variables,) -> program.
        storages: The same in other settings, in which layers have other kernels or constants.
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
    storages: Sequence[Callable[[np.ndarray], Program]] = ()
    seed: int = 0
    known: Callable[[str], float | None] | None = None


@dataclass(frozen=True)
class CostTable:
    """Costs of configurations.

    Attributes:
        latency: Milliseconds as a pairwise sum over layers.
        weight_bytes: Bytes of constants as a pairwise sum over layers.
        storages: What each of those settings adds to latency and weight_bytes.
        model: Of single programs.
    """

    latency: PairwiseSum
    weight_bytes: PairwiseSum
    storages: tuple[tuple[PairwiseSum, PairwiseSum], ...]
    model: CostModel


def measure_costs(request: CostRequest, progress: Callable[[str], None] = lambda clause: None) -> CostTable:
    """Make the cost table; kernels that are in the cache with their times are not timed again.

    Args:
        request: What it is made of.
        progress: Called whenever a slow step begins, and with what is left out.

    Raises:
        BuildError: The reference does not build; a mixed configuration that does not is left out.
    """
    rng = np.random.default_rng(request.seed)
    programs = [
        request.reference,
        *(request.lower(row) for row in covering(_sizes(request), pairs_around(request.graph, request.layers), rng)),
    ]
    clock = _clock(request)
    _time(request, clock, programs, [], progress)
    # A kernel is faster in a uniform network than in mixtures: told on the clock of the plainest uniform ones.
    uniform = _uniform(_sizes(request))
    others = [lower(row) for lower in request.storages for row in uniform]
    _time(request, clock, others, [request.lower(row) for row in uniform], progress)

    def node_costs(row: np.ndarray, lower: Callable[[np.ndarray], Program] = request.lower) -> dict[str, np.ndarray]:
        return _node_costs(request, clock, lower(row))

    progress("splitting their costs into those of layers and neighbours")
    latency, weight_bytes = fit_costs(request.graph, request.layers, node_costs, 2, rng)
    scale = _scale(request, clock)
    storages = [_added(request, node_costs, lower) for lower in request.storages]
    added = tuple((latency.scaled(scale), weights) for latency, weights in storages)
    return CostTable(latency.scaled(scale), weight_bytes, added, CostModel(request.linker, clock, scale))


def measure_uniform(
    request: CostRequest, progress: Callable[[str], None] = lambda clause: None, tried: Sequence[Program] = ()
) -> CostTable:
    """The same by the kernels of uniform networks, which are few: what neighbours add to layers is left out.

    Args:
        request: What it is made of.
        progress: As for `measure_costs`.
        tried: Other programs, whose kernels there are already. With them all kernels are timed anew, and the times are not kept:
            another study's trials are others.

    Raises:
        BuildError: The reference does not build; another uniform network that does not is left out.
    """
    if tried and request.known is None:
        plans = _plans(request, [*uniform_programs(request), *tried])
        progress(f"building and timing {len(plans)} networks, uniform and tried ones, to know what kernels cost in them")
        clock = KernelClock(GivenTimes(_seconds(request, [one for one, _ in plans], progress).get))
        _learn(clock, plans)
    else:
        clock, what = _clock(request, uniform=True), "uniform networks, to know what layers cost by themselves"
        _time(request, clock, uniform_programs(request), [request.reference], progress, what)
    model, sizes = CostModel(request.linker, clock, _scale(request, clock)), _sizes(request)

    def uniform_costs(lower: Callable[[np.ndarray], Program]) -> list[np.ndarray]:
        terms = [np.zeros((2, size)) for size in sizes]
        for row in _uniform(sizes):
            found = _node_costs(request, clock, lower(row))
            # What is no layer costs what it does in that network, whichever layer makes it do so.
            others = sum((cost for name, cost in found.items() if name not in request.layers), np.zeros(2))
            for term, name, chosen in zip(terms, request.layers, row, strict=True):
                term[:, chosen] = found.get(name, 0.0) + others / len(terms)
        return terms

    plain = uniform_costs(request.lower)
    added = [[b - a for a, b in zip(plain, uniform_costs(lower), strict=True)] for lower in request.storages]
    (latency, weight_bytes), *storages = (
        (PairwiseSum(tuple(model.scale * ms for ms, _ in terms), {}), PairwiseSum(tuple(held for _, held in terms), {}))
        for terms in (plain, *added)
    )
    return CostTable(latency, weight_bytes, tuple(storages), model)


def uniform_programs(request: CostRequest) -> list[Program]:
    """The float module, and one program for every precision in every setting."""
    lowers = (request.lower, *request.storages)
    return [request.reference, *(lower(row) for lower in lowers for row in _uniform(_sizes(request)))]


def _clock(request: CostRequest, uniform: bool = False) -> KernelClock:
    if request.known is not None:
        return KernelClock(GivenTimes(request.known))
    return KernelClock(KernelTimes(request.linker.cache.directory, uniform))


def _node_costs(request: CostRequest, clock: KernelClock, program: Program) -> dict[str, np.ndarray]:
    """Node -> milliseconds and bytes of constants, float64 (2,)."""
    nodes = {node.name for node in request.graph.nodes}
    found: dict[str, np.ndarray] = {}
    for call in request.linker.plan(program).calls:
        # Conversions are called after the node whose value they convert.
        name = call.op.name if call.op.name in nodes else call.op.name.rpartition(".")[0]
        found[name] = found.get(name, np.zeros(2)) + (1e3 * clock.seconds(call), call.constant_bytes)
    return found


def _scale(request: CostRequest, clock: KernelClock) -> float:
    """From the clock of the kernels' times to that of the trials."""
    return request.reference_ms / (1e3 * sum(clock.seconds(call) for call in request.linker.plan(request.reference).calls))


def _added(
    request: CostRequest, node_costs: Callable[..., dict[str, np.ndarray]], lower: Callable[[np.ndarray], Program]
) -> tuple[PairwiseSum, PairwiseSum]:
    """What another setting adds to the milliseconds and bytes of every layer, all layers in one precision."""
    terms = [np.zeros((2, size)) for size in _sizes(request)]
    for row in _uniform(_sizes(request)):
        plain, other = node_costs(row), node_costs(row, lower)
        for term, name, chosen in zip(terms, request.layers, row, strict=True):
            term[:, chosen] = other.get(name, 0.0) - plain.get(name, np.zeros(2))
    return PairwiseSum(tuple(term[0] for term in terms), {}), PairwiseSum(tuple(term[1] for term in terms), {})


def _time(
    request: CostRequest,
    clock: KernelClock,
    programs: Sequence[Program],
    known: Sequence[Program],
    progress: Callable[[str], None],
    what: str = "mixed configurations for the cost table",
) -> None:
    """Let a clock know the kernels of some programs: those that have one without a time are run, beside known ones."""
    plans = _plans(request, programs)
    unknown = [one for one, calls in plans if any(clock.times.get(call.symbol) is None for call in calls)]
    if unknown and request.known is not None:
        progress(f"{len(unknown)} of {len(plans)} mixed configurations have kernels without a time, which the planner guesses")
    elif unknown:
        progress(f"building and timing {len(unknown)} {what}")
        beside = [one for one in known if all(one is not other for other in unknown)]
        assert not isinstance(clock.times, GivenTimes)
        clock.times.put(_new_times(_seconds(request, [*beside, *unknown], progress), clock.times))
    _learn(clock, plans)


_Plans = list[tuple[Program, Sequence[PlannedCall]]]


def _plans(request: CostRequest, programs: Sequence[Program]) -> _Plans:
    """Programs with their calls; of those with the same kernels the first, as the reference is often one of the others too."""
    plans: dict[tuple[str, ...], tuple[Program, Sequence[PlannedCall]]] = {}
    for one in programs:
        calls = request.linker.plan(one).calls
        plans.setdefault(tuple(call.symbol for call in calls), (one, calls))
    return list(plans.values())


def _learn(clock: KernelClock, plans: _Plans) -> None:
    for _, calls in plans:
        for call in calls:
            clock.learn(call)


def _seconds(request: CostRequest, programs: Sequence[Program], progress: Callable[[str], None]) -> dict[str, float]:
    """Kernel -> its seconds in the programs that can be built."""
    linker, modules = request.linker, _built(request, programs, progress)
    if not modules:
        return {}
    if linker.target.device == "cuda":
        return time_gpu_kernels(linker, [module.program for module in modules])
    return time_kernels(modules, request.image, linker.target.threads)


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


def _uniform(sizes: Sequence[int]) -> list[np.ndarray]:
    """All variables in their first value, their second and so on, or their last."""
    return [np.array([min(value, size - 1) for size in sizes]) for value in range(max(sizes))]


def _sizes(request: CostRequest) -> list[int]:
    return [len(precisions) for precisions in request.layers.values()]
