"""The planner's tables of a small compiled network, and their rows where every term is known."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from analytic import LOSS_PER_NAT, MODE_FACTOR, AnalyticEvaluator, make_graph

from qsearch.build.link import CompiledModule
from qsearch.config import WeightSettings
from qsearch.errors import BuildError, StudyError
from qsearch.measure.kernel_times import KernelTimes
from qsearch.measure.memory import measure_memory
from qsearch.quantize.program import Program
from qsearch.search.bound_space import BoundSpace, Choices, bind_space
from qsearch.search.evaluation import requirements
from qsearch.search.evaluation.evaluator import Settings
from qsearch.search.evaluation.objective import ModelEvaluator, open_evaluator
from qsearch.search.opening import choose_opening, mixed_anchors, opening_setting, plain_anchors
from qsearch.search.space import SearchSpace, load_space
from qsearch.search.tables import cost_table, needed_kernels
from qsearch.search.tables.layer_tables import Tables, layer_rows
from qsearch.search.tables.measure_tables import measure_tables
from qsearch.search.tables.needed_kernels import plain_config
from qsearch.search.tables.settings import MOST_SETTINGS, assignment_config, lowest, table_settings


@pytest.fixture(scope="module")
def measured(small: Path) -> tuple[ModelEvaluator, BoundSpace, Tables]:
    """The smallest network with its tables."""
    settings = Settings("broken_networks:Net", data=small / "data", cache_dir=small / "studies" / "cache")
    evaluator = open_evaluator(settings, lambda clause: None)
    space = bind_space(load_space("default"), evaluator.graph)
    return evaluator, space, measure_tables(evaluator, space, lambda clause: None)


def configs(space: BoundSpace) -> list[tuple[np.ndarray, dict[str, str]]]:
    """Every choice of precisions, as a row and as parameters."""
    rows = itertools.product(*(range(len(one.values)) for one in space.layers))
    return [(np.array(row), {one.name: one.values[v] for one, v in zip(space.layers, row, strict=True)}) for row in rows]


def test_bytes_are_those_of_the_modules(measured: tuple[ModelEvaluator, BoundSpace, Tables]) -> None:
    evaluator, space, tables = measured
    for row, layers in configs(space):
        module = evaluator.compile(space.config({**table_settings(space)[0], **layers}))
        assert tables.weight_bytes(row[None])[0] == pytest.approx(module.weight_bytes, abs=0.5)
        assert tables.cost(module_config := space.config(layers)).peak_bytes == measure_memory(module).peak_bytes, module_config


@pytest.mark.parametrize("granularity", ["channel_wise", "layer_wise", "group_wise"])
def test_roundings_and_corrected_biases_cost_what_plain_ones_do(
    measured: tuple[ModelEvaluator, BoundSpace, Tables], granularity: str
) -> None:
    evaluator, space, tables = measured
    changed = {"granularity": granularity, "rounding": "second_order", "bias_correction": "measured"}
    for _, layers in configs(space):
        config = space.config({**table_settings(space)[0], **layers}).model_copy(update=changed)
        assert plain_config(config) != config
        plain, full = (evaluator.linker.plan(evaluator.lower(one)) for one in (plain_config(config), config))
        symbols = [[(call.symbol, call.constant_bytes) for call in plan.calls] for plan in (plain, full)]
        assert symbols[0] == symbols[1]
        assert tables.cost(config).peak_bytes == measure_memory(evaluator.compile(config)).peak_bytes


@pytest.mark.parametrize("mixed", [True, False])
def test_settings_with_other_kernels_have_costs_of_their_own(
    measured: tuple[ModelEvaluator, BoundSpace, Tables], mixed: bool
) -> None:
    evaluator, _, _ = measured
    chosen = {"version": 1, "precisions": {"default": ["fp32", "w4a8"]}, "calibration": {"modes": ["max", "mse"]}}
    space = bind_space(SearchSpace.model_validate({**chosen, "granularities": ["channel_wise", "group_wise"]}), evaluator.graph)
    tables = evaluator.tables(space, mixed)
    row = lowest(space)[None]
    found = {}
    for setting in tables.settings:
        module = evaluator.compile(assignment_config(space, setting.values, row[0]))
        expected = tables.weight_bytes(row) + setting.added_bytes(row)
        assert expected[0] == pytest.approx(module.weight_bytes, abs=0.5)
        exact = tables.cost(assignment_config(space, setting.values, row[0])).latency_ms
        assert tables.latency(row)[0] + setting.added_ms(row)[0] == pytest.approx(exact, rel=0.05)
        found[setting.values["granularity"]] = setting.added_bytes(row)[0]
    # Of a calibration neither kernels nor bytes know anything.
    assert len(tables.settings) == 4 and found["channel_wise"] == 0 != found["group_wise"]


def test_latency_is_split_into_terms_without_a_loss(measured: tuple[ModelEvaluator, BoundSpace, Tables]) -> None:
    _, space, tables = measured
    rows, layers = zip(*configs(space), strict=True)
    exact = [tables.cost(space.config(one)).latency_ms for one in layers]
    assert min(exact) > 0
    np.testing.assert_allclose(tables.latency(np.stack(rows)), exact, rtol=0.05)


def test_a_second_study_times_nothing(measured: tuple[ModelEvaluator, BoundSpace, Tables], monkeypatch) -> None:
    evaluator, space, tables = measured
    clauses: list[str] = []
    monkeypatch.setattr(cost_table, "time_kernels", lambda *arguments: pytest.fail("kernels were timed again"))
    again = measure_tables(evaluator, space, clauses.append)
    assert layer_rows(space, again) == layer_rows(space, tables)
    assert not [clause for clause in clauses if "timing" in clause or "sensitivity" in clause]
    assert {"cost_table", "sensitivity_table"} <= set(evaluator.seconds)


def test_uniform_networks_tell_costs_before_there_are_tables(
    measured: tuple[ModelEvaluator, BoundSpace, Tables], monkeypatch, tmp_path: Path
) -> None:
    evaluator, space, tables = measured
    monkeypatch.setattr(cost_table, "KernelTimes", lambda directory, uniform: KernelTimes(tmp_path, uniform))
    clauses: list[str] = []
    monkeypatch.setattr(evaluator, "progress", clauses.append)
    spent = evaluator.seconds.get("uniform_costs", 0.0)
    draft = evaluator.draft(space, opening_setting(space))
    cost = draft.cost
    # Made in parts, tables take what all of these do.
    assert evaluator.seconds["uniform_costs"] > spent
    assert clauses == ["building and timing 2 uniform networks, to know what layers cost by themselves"]
    in_float = space.config({one.name: "fp32" for one in space.layers})
    assert cost(in_float).latency_ms == pytest.approx(evaluator.baseline.latency.median_ms)
    for _, layers in configs(space):
        config = space.config(layers)
        # The same kernels, or their kin, timed at another moment.
        assert 0.2 < cost(config).latency_ms / tables.cost(config).latency_ms < 5
        assert cost(config).peak_bytes == tables.cost(config).peak_bytes
    # In the next tables they are known, among mixtures they are not.
    clauses.clear()
    again = evaluator.tables(space, mixed=False)
    assert not [clause for clause in clauses if "timing" in clause] and again.cost(config) == cost(config)
    assert KernelTimes(tmp_path).get((call := evaluator.linker.plan(evaluator.lower(config)).calls[0]).symbol) is None
    assert KernelTimes(tmp_path, uniform=True).get(call.symbol) is not None
    for anchor in choose_opening(space, cost, evaluator.baseline):
        assert evaluator.compile(space.config(anchor.values))
    # Planned over, they are sums over the layers as these are in uniform networks.
    drafted = draft.tables()
    assert [one.values for one in drafted.settings] == [opening_setting(space)] and drafted.cost(in_float) == cost(in_float)
    for row in (np.zeros_like(lowest(space)), lowest(space)):
        config = assignment_config(space, opening_setting(space), row)
        assert drafted.latency(row[None])[0] == pytest.approx(cost(config).latency_ms)
        assert drafted.weight_bytes(row[None])[0] == pytest.approx(tables.weight_bytes(row[None])[0], abs=0.5)
    # The same images and directions.
    assert layer_rows(space, drafted)[0]["divergence"] > 0
    np.testing.assert_allclose(drafted.divergence(config)(row[None]), tables.divergence(config)(row[None]))


def test_tried_networks_tell_what_kernels_take_in_them(
    measured: tuple[ModelEvaluator, BoundSpace, Tables], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator, space, _ = measured
    folder, setting = evaluator.linker.cache.directory, table_settings(space)[0]
    before = {file.name: file.read_bytes() for file in folder.glob("*time.json")}
    tried = [space.config({**setting, **layers}) for _, layers in configs(space) if len(set(layers.values())) > 1][:2]
    symbols = [{kernel.symbol for kernel in evaluator.compile(config).kernels} for config in tried]
    timed: list[set[str]] = []

    def every_one(modules: Sequence[CompiledModule], *_: Any) -> dict[str, float]:
        """Kernels that mixtures have take 1 ms, those of uniform networks alone 2 ms."""
        timed.extend({kernel.symbol for kernel in one.kernels} for one in modules)
        return {symbol: 1e-3 if symbol in set().union(*symbols) else 2e-3 for symbol in set().union(*timed)}

    monkeypatch.setattr(cost_table, "time_kernels", every_one)
    tables = evaluator.tables(space, mixed=False, tried=tried)
    assert all(some in timed for some in symbols) and len(timed) > len(symbols), "with uniform networks, all anew"
    in_float = space.config({**setting, **{one.name: "fp32" for one in space.layers}})
    seconds = [
        sum(1e-3 if call.symbol in set().union(*symbols) else 2e-3 for call in evaluator.linker.plan(evaluator.lower(one)).calls)
        for one in (in_float, *tried)
    ]
    costs = [tables.cost(one).latency_ms for one in (in_float, *tried)]
    np.testing.assert_allclose(np.array(costs) / costs[0], np.array(seconds) / seconds[0])
    # They are this search's alone: those of another depend on what it tries.
    assert {file.name: file.read_bytes() for file in folder.glob("*time.json")} == before


def test_what_is_packed_has_all_that_a_search_begins_with(measured: tuple[ModelEvaluator, BoundSpace, Tables]) -> None:
    evaluator, _, _ = measured
    space = bind_space(load_space("full"), evaluator.graph)
    packed = list(needed_kernels._configs(evaluator, space, np.random.default_rng(0), lambda: 0))
    assert all(space.config(anchor.values) in packed for anchor in (*plain_anchors(space), *mixed_anchors(space)))


def test_float_costs_what_it_was_measured_at(measured: tuple[ModelEvaluator, BoundSpace, Tables]) -> None:
    evaluator, space, tables = measured
    in_float = space.config({one.name: "fp32" for one in space.layers})
    assert tables.cost(in_float).latency_ms == pytest.approx(evaluator.baseline.latency.median_ms)
    # Also where no layer of the space may be in float.
    chosen = {"version": 1, "name": "int8", "precisions": {"default": ["int8"]}}
    only = bind_space(SearchSpace.model_validate(chosen), evaluator.graph)
    again = measure_tables(evaluator, only, lambda clause: None)
    assert again.cost(in_float).latency_ms == pytest.approx(evaluator.baseline.latency.median_ms)


def fails_where(chosen: Callable[[Program], bool], evaluator: ModelEvaluator) -> Callable[[Program], CompiledModule]:
    """A way to build all programs but some."""

    def build(program: Program) -> CompiledModule:
        if chosen(program):
            raise BuildError("kernel conv_0 does not compile")
        return evaluator.linker.build(program)

    return build


def is_integer(program: Program) -> bool:
    """Whether no layer is in float."""
    return all(op.key.precision != "fp32" for op in program.ops)


def test_a_kernel_that_does_not_compile_takes_its_time_from_its_kin(
    measured: tuple[ModelEvaluator, BoundSpace, Tables], monkeypatch, tmp_path: Path
) -> None:
    evaluator, space, _ = measured
    monkeypatch.setattr(cost_table, "KernelTimes", lambda directory, uniform: KernelTimes(tmp_path, uniform))
    monkeypatch.setattr(evaluator, "build", fails_where(is_integer, evaluator))
    clauses: list[str] = []
    tables = measure_tables(evaluator, space, clauses.append)
    (said,) = [clause for clause in clauses if "conv_0" in clause]
    assert said == "1 of them cannot be built, so the cost table does without: kernel conv_0 does not compile"
    lowest = space.config({one.name: "int8" for one in space.layers})
    assert tables.cost(lowest).latency_ms > 0


def test_a_reference_that_does_not_compile_is_no_matter_of_a_kernel(
    measured: tuple[ModelEvaluator, BoundSpace, Tables], monkeypatch, tmp_path: Path
) -> None:
    evaluator, space, _ = measured
    monkeypatch.setattr(cost_table, "KernelTimes", lambda directory, uniform: KernelTimes(tmp_path, uniform))
    monkeypatch.setattr(evaluator, "build", fails_where(lambda program: not is_integer(program), evaluator))
    with pytest.raises(BuildError, match="conv_0"):
        measure_tables(evaluator, space, lambda clause: None)


def test_tables_are_not_compiled_on_a_full_disk(
    measured: tuple[ModelEvaluator, BoundSpace, Tables], monkeypatch, tmp_path: Path
) -> None:
    evaluator, space, _ = measured
    monkeypatch.setattr(cost_table, "KernelTimes", lambda directory, uniform: KernelTimes(tmp_path, uniform))
    monkeypatch.setattr(requirements, "LEAST_FREE_BYTES", 1 << 60)
    with pytest.raises(StudyError, match="the disk is full"):
        measure_tables(evaluator, space, lambda clause: None)


def test_tvm_runs_once_more_than_it_counts(measured: tuple[ModelEvaluator, BoundSpace, Tables]) -> None:
    """Kernel times divide by that."""
    evaluator, space, _ = measured
    module, calls = evaluator.compile(space.config({})), []
    machine = module.open()
    machine.set_instrument(lambda function, name, before, *rest: (before and calls.append(name)) and 0)
    image = tvm.runtime.tensor(np.ascontiguousarray(evaluator.images("search")[:1]))
    machine.time_evaluator("main", tvm.cpu(), number=3, repeat=1)(image)
    assert calls.count(module.kernels[0].symbol) == 4


def test_new_kernels_are_told_on_the_clock_of_the_known_ones(tmp_path: Path) -> None:
    known = KernelTimes(tmp_path)
    known.put({"a": 1.0, "b": 3.0, "c": 5.0})
    # The machine has become twice as slow; one of the three was disturbed.
    found = cost_table._new_times({"a": 2.0, "b": 6.0, "c": 90.0, "d": 8.0}, known)
    assert found == {"d": 4.0}
    assert cost_table._new_times({"e": 8.0}, known) == {"e": 8.0}


def test_divergence_depends_on_the_setting(measured: tuple[ModelEvaluator, BoundSpace, Tables]) -> None:
    _, space, tables = measured
    lowest = {one.name: "int8" for one in space.layers}
    found = [tables.divergence(space.config({**setting, **lowest})) for setting in table_settings(space)]
    assert all(term[0] == 0 and term[1] > 0 for one in found for term in one.unary)
    assert len({one.unary[1][1] for one in found}) > 1


def test_rows_are_the_terms_in_the_setting_that_makes_the_least_of_them() -> None:
    evaluator = AnalyticEvaluator()
    space = bind_space(load_space("default"), evaluator.graph)
    rows = layer_rows(space, evaluator.tables(space))
    names = [layer.name for layer in evaluator.graph.layers]
    assert sorted(row["layer"] for row in rows) == sorted(names)
    for row in rows:
        index = names.index(row["layer"])
        assert row == {
            "layer": names[index],
            "position": index,
            "precision": "int8",
            "divergence": pytest.approx(evaluator._loss[index] * MODE_FACTOR["mse"] / LOSS_PER_NAT),
            "latency_ms": pytest.approx(-evaluator._cost[index] * evaluator._gain[index]),
            "weight_bytes": -3000.0,
        }
    nats = [row["divergence"] for row in rows]
    assert nats == sorted(nats, reverse=True)


def test_settings_of_a_wide_space_are_some_of_all_the_plainest_first() -> None:
    space = bind_space(load_space("full"), make_graph())
    found = table_settings(space)
    assert len(found) == MOST_SETTINGS
    configs = [assignment_config(space, one, lowest(space)) for one in found]
    assert len({config.content_hash() for config in configs}) == MOST_SETTINGS
    assert configs[0].weights == WeightSettings() and not configs[0].equalization
    # Every choice occurs.
    for one in space.settings:
        if isinstance(one, Choices):
            assert {setting[one.name] for setting in found} == set(one.values)
    assert table_settings(space) == found
