"""Programs that between them have every kernel that configurations of a space can need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from qsearch.build.link import Linker
from qsearch.config import QuantConfig
from qsearch.errors import TrialError
from qsearch.models.graph import Model
from qsearch.quantize.program import Program
from qsearch.search.bound_space import BoundSpace
from qsearch.search.opening import mixed_anchors, plain_anchors
from qsearch.search.tables.cost_fit import covering, mixture, pairs_around
from qsearch.search.tables.settings import assignment_config, table_settings

__all__ = ["ProgramSource", "needed_programs", "plain_config"]

# Random configurations in a row that bring no new kernel, after which all are taken to be known; and the most drawn.
STALE, MOST_DRAWN = 24, 300


class ProgramSource(Protocol):
    """What configurations are lowered with."""

    model: Model
    linker: Linker

    def lower(self, config: QuantConfig) -> Program:
        """The program of a configuration."""
        ...


def needed_programs(
    source: ProgramSource, space: BoundSpace, progress: Callable[[str], None] = lambda clause: None, seed: int = 0
) -> list[Program]:
    """Programs with all kernels of a space, each with a kernel that those before it do not have; float is the first.

    Kernels depend on the precisions of a layer and its neighbours, so that the configurations in which every two values
    of neighbours meet have nearly all of them, under every combination of settings. Random ones follow until they bring
    nothing new.

    Args:
        source: A model and a target.
        space: Bound to that model.
        progress: Called with what is left out.
        seed: Of the random configurations.
    """
    found: list[Program] = []
    seen: set[str] = set()
    failed = 0
    for config in _configs(source, space, np.random.default_rng(seed), lambda: len(seen)):
        try:
            program = source.lower(plain_config(config))
            symbols = {call.symbol for call in source.linker.plan(program).calls}
        except TrialError:
            failed += 1
            continue
        if not symbols <= seen:
            seen |= symbols
            found.append(program)
    if failed:
        progress(f"{failed} configurations cannot be quantized, and bring no kernels")
    return found


def _configs(
    source: ProgramSource, space: BoundSpace, rng: np.random.Generator, known: Callable[[], int]
) -> Iterator[QuantConfig]:
    yield QuantConfig(default_precision="fp32")
    yield space.config(space.start_values())
    yield from (space.config(one.values) for one in (*plain_anchors(space), *mixed_anchors(space)))
    layers = {one.name: one.values for one in space.layers}
    sizes, settings = [len(values) for values in layers.values()], table_settings(space)
    if not sizes:
        yield from (assignment_config(space, setting, np.zeros(0, int)) for setting in settings)
        return
    rows = covering(sizes, pairs_around(source.model.graph, layers), rng)
    for setting in settings:
        # Under the first setting all, under others the uniform ones, which stand first.
        some = rows if setting is settings[0] else rows[: max(sizes)]
        yield from (assignment_config(space, setting, row) for row in some)
    stale = 0
    for _ in range(MOST_DRAWN):
        before = known()
        yield assignment_config(space, settings[int(rng.integers(len(settings)))], mixture(sizes, rng))
        stale = 0 if known() > before else stale + 1
        if stale >= STALE:
            return


def plain_config(config: QuantConfig) -> QuantConfig:
    """The same without what takes long and changes values only, never a kernel or the size of a constant."""
    return config.model_copy(update={"rounding": "nearest", "bias_correction": "none"})
