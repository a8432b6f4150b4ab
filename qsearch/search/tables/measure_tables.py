"""Measure the planner's tables: what layers cost, and what each of them does to the outputs."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from qsearch.build.link import CompiledModule, Linker
from qsearch.config import QuantConfig
from qsearch.measure.devices.device import Away
from qsearch.measure.latency import first_images
from qsearch.measure.measurement import Measurement
from qsearch.models.graph import Model
from qsearch.quantize.program import Program
from qsearch.quantize.variants import Variants
from qsearch.search.bound_space import BoundSpace
from qsearch.search.evaluation.evaluator import Progress, Settings, said_once
from qsearch.search.tables.cost import Cost
from qsearch.search.tables.cost_fit import pairs_around
from qsearch.search.tables.cost_table import CostRequest, measure_costs, measure_uniform, uniform_programs
from qsearch.search.tables.divergence import divergence_sum
from qsearch.search.tables.kernel_clock import CostModel
from qsearch.search.tables.layer_tables import Draft, Tables
from qsearch.search.tables.needed_kernels import needed_programs, plain_config
from qsearch.search.tables.pairwise import PairwiseSum, nothing
from qsearch.search.tables.sensitivity import IMAGES, SensitivityRequest
from qsearch.search.tables.sensitivity_file import kept_sensitivity
from qsearch.search.tables.sensitivity_table import Sensitivity
from qsearch.search.tables.settings import (
    Setting,
    TableKey,
    assignment_config,
    chosen_settings,
    lowest,
    measured_settings,
    storage,
    table_key,
)

__all__ = ["TableSource", "measure_draft", "measure_tables"]


class TableSource(Protocol):
    """What tables are measured on."""

    settings: Settings
    model: Model
    linker: Linker
    away: Away | None
    variants: Variants
    seconds: dict[str, float]

    @property
    def identity(self) -> dict[str, str]:
        """Fingerprints of model, data and target."""
        ...

    @property
    def baseline(self) -> Measurement:
        """The float module."""
        ...

    def lower(self, config: QuantConfig) -> Program:
        """The program of a configuration."""
        ...

    def ranges(self, config: QuantConfig) -> dict[str, tuple[float, float]]:
        """Activation ranges of a configuration's calibration."""
        ...

    def build(self, program: Program) -> CompiledModule:
        """Link a program, if there is room for what it may have to compile."""
        ...

    def images(self, part: str) -> np.ndarray:
        """Preprocessed images, float32 (N, C, H, W)."""
        ...


def measure_tables(
    source: TableSource, space: BoundSpace, progress: Progress, mixed: bool = True, tried: Sequence[QuantConfig] = ()
) -> Tables:
    """Measure both tables; how long it took is booked in `source.seconds`.

    Args:
        source: A model, its images and a target.
        space: Bound to that model.
        progress: Called whenever a slow step begins.
        mixed: Whether costs are those in mixed networks, neighbours included, which takes longest; else in uniform ones.
        tried: Measured configurations, whose modules tell the times of kernels as well where costs are those in uniform ones.
    """
    start = time.monotonic()
    sensitivity = _sensitivity(source, space, measured_settings(space), progress)
    settings = chosen_settings(space, sensitivity)
    _book(source, "sensitivity_table", start)
    start = time.monotonic()
    others = [one for one in dict.fromkeys(map(storage, settings)) if one != storage(settings[0])]
    request = _cost_request(source, space, [settings[0], *({**settings[0], **dict(one)} for one in others)])
    if source.away is not None:
        progress(f"times of kernels are those of {source.away.description}")
        source.away.learn(needed_programs(source, space, progress) if mixed else uniform_programs(request))
    if mixed:
        costs = measure_costs(request, progress)
    else:
        costs = measure_uniform(request, progress, [source.lower(plain_config(config)) for config in tried])
    _book(source, "cost_table" if mixed else "uniform_costs", start)

    _return_memory()
    none = nothing(costs.latency.sizes)
    added = {storage(settings[0]): (none, none)}
    added |= dict(zip(others, costs.storages, strict=True))
    apart = tuple(Setting(one, *added[storage(one)]) for one in settings)
    divergence, cost = _divergence(source, space, sensitivity), _cost(source, costs.model)
    return Tables(costs.latency, costs.weight_bytes, divergence, cost, source.baseline, apart)


def _book(source: TableSource, step: str, start: float) -> None:
    """Add to what a step took before: tables are made in parts."""
    source.seconds[step] = source.seconds.get(step, 0.0) + time.monotonic() - start


def _layers(space: BoundSpace) -> Mapping[str, tuple[str, ...]]:
    return {one.name: one.values for one in space.layers}


def _return_memory() -> None:
    """Give back to the system what is free: tables need more memory than trials do, and glibc would keep it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def measure_draft(source: TableSource, space: BoundSpace, setting: Mapping[str, Any], progress: Progress) -> Draft:
    """Time the kernels of uniform networks; how long it took is booked in `source.seconds`.

    Args:
        source: A model, its images and a target.
        space: Bound to that model.
        setting: Values of the parameters that are no layer's, see `assignment_values`.
        progress: Called whenever a slow step begins, that of the draft's divergences included.
    """
    start = time.monotonic()
    request = _cost_request(source, space, [setting])
    if source.away is not None:
        source.away.learn(uniform_programs(request))
    costs = measure_uniform(request, progress)
    _book(source, "uniform_costs", start)
    cost = _cost(source, costs.model)

    def tables() -> Tables:
        start = time.monotonic()
        divergence = _divergence(source, space, _sensitivity(source, space, [setting], progress))
        _return_memory()
        none = nothing(costs.latency.sizes)
        only = Setting(setting, none, none)
        _book(source, "draft", start)
        return Tables(costs.latency, costs.weight_bytes, divergence, cost, source.baseline, (only,))

    return Draft(cost, tables)


def _cost(source: TableSource, model: CostModel) -> Callable[[QuantConfig], Cost]:
    return lambda config: model.cost(source.lower(plain_config(config)))


def _divergence(
    source: TableSource, space: BoundSpace, sensitivity: Mapping[TableKey, Sensitivity]
) -> Callable[[QuantConfig], PairwiseSum]:
    pairs = pairs_around(source.model.graph, _layers(space))
    return lambda config: divergence_sum(sensitivity[table_key(config)], config, pairs)


def _cost_request(source: TableSource, space: BoundSpace, settings: Sequence[Mapping[str, Any]]) -> CostRequest:
    """What costs are measured with, in the first of some settings, and what the others add."""

    def lowered(setting: Mapping[str, Any], row: np.ndarray) -> Program:
        return source.lower(plain_config(assignment_config(space, setting, row)))

    lower, *others = (partial(lowered, setting) for setting in settings)
    return CostRequest(
        source.model.graph,
        _layers(space),
        lower,
        source.linker,
        source.build,
        first_images(source.images("search"), source.model.graph.input.shape[0]),
        source.lower(QuantConfig(default_precision="fp32")),
        source.baseline.latency.median_ms,
        others,
        known=None if source.away is None else source.away.seconds,
    )


def _sensitivity(
    source: TableSource, space: BoundSpace, settings: Sequence[Mapping[str, Any]], progress: Progress
) -> dict[TableKey, Sensitivity]:
    groups: dict[TableKey, list[QuantConfig]] = {}
    for setting in settings:
        config = assignment_config(space, setting, lowest(space))
        config = config.model_copy(update={"bias_absorption": False, "migration": 0.0})
        groups.setdefault(table_key(config), []).append(config)
    identity = {name: source.identity[name] for name in ("model", "data")}
    tables = {}
    for key, configs in groups.items():
        variant = source.variants(configs[0])
        request = SensitivityRequest(
            variant.model,
            source.images("calibration")[:IMAGES],
            source.ranges,
            variant.weights,
            lambda config, variant=variant: variant.means(config.bias_correction),  # type: ignore[misc]
            _layers(space),
            configs,
        )
        said = said_once(progress, f"measuring the sensitivity of layers{', equalized' if key[0] else ''}, images")
        tables[key] = kept_sensitivity(source.settings.cache_dir / "sensitivity", identity, request, said)
    return tables
