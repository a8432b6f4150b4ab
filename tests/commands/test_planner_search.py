"""`search --sampler planner`: over the analytic network, and for real over the smallest one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import moocore
import numpy as np
import optuna
import pytest
from analytic import AnalyticEvaluator, invoke
from optuna.trial import TrialState
from PIL import Image
from real_search import SMALL, completed, within

from qsearch.config import QuantConfig
from qsearch.report.table_notes import attach_tables, table_rows
from qsearch.search.bound import tables_bound
from qsearch.search.bound_space import bind_space
from qsearch.search.front import objective_hypervolume, study_front
from qsearch.search.opening import plain_anchors, uniform_anchors
from qsearch.search.space import load_space
from qsearch.search.study import StudyHandle, load_study
from qsearch.search.tables.cost import Cost
from qsearch.search.tables.layer_tables import Draft, Tables, layer_rows
from qsearch.search.tables.pairwise import PairwiseSum
from qsearch.session import planned_trials
from qsearch.session.planned_trials import PlannedTrials
from qsearch.session.supervisor import Watch

PLANNED = ("search", "--sampler", "planner")
# Trials over the draft in this process; in others they are as many as there are.
EARLY = 6


@pytest.fixture(scope="module", autouse=True)
def _early_tables() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(planned_trials, "drafted_trials", lambda space: EARLY)
        yield


def handle_of(folder: Path, name: str = "demo") -> StudyHandle:
    """The study of a folder."""
    return load_study(name, f"sqlite:///{folder}/studies/{name}.db")


def slow_if_depthwise(draft: Callable[..., Draft]) -> Callable[..., Draft]:
    """A draft in which other plain networks than the uniform one are worth a trial."""

    def slowed(self: AnalyticEvaluator, *given: Any) -> Draft:
        found = draft(self, *given)

        def cost(config: QuantConfig) -> Cost:
            told = found.cost(config)
            depthwise = [config.precision[layer.name] for layer in self.graph.layers if layer.is_depthwise]
            return replace(told, latency_ms=told.latency_ms + 0.8 * depthwise.count("int8"))

        return replace(found, cost=cost)

    return slowed


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A folder with a planned search, and the document it printed."""
    folder = tmp_path_factory.mktemp("planned")
    result = invoke(folder, *PLANNED, "--budget", "12", "--json")
    assert result.exit_code == 0, result.stderr
    assert "% of the" in result.stderr and "that the planner's tables, corrected by 12 trials, predict" in result.stderr
    return folder, json.loads(result.stdout)


def test_the_tables_are_kept_in_the_study(planned: tuple[Path, dict]) -> None:
    folder, _ = planned
    handle, evaluator = handle_of(folder), AnalyticEvaluator()
    space = bind_space(load_space("default"), evaluator.graph)
    rows = layer_rows(space, evaluator.tables(space))
    assert table_rows(handle) == rows
    assert {row["layer"] for row in rows} == {layer.name for layer in evaluator.graph.layers}
    assert sorted(row["position"] for row in rows) == list(range(8))
    nats = [row["divergence"] for row in rows]
    assert nats == sorted(nats, reverse=True) and nats[-1] > 0
    dashboard = pytest.importorskip("optuna_dashboard")
    note = dashboard.get_note(handle.study)
    assert rows[0]["layer"] in note
    name = note.split("/artifacts/", 1)[1].split("/", 1)[1].split(")", 1)[0]
    assert Image.open(folder / "studies" / "demo.artifacts" / name).format == "PNG"
    assert name in {one.artifact_id for one in optuna.artifacts.get_all_artifact_meta(handle.study)}


def test_a_planned_search_continues_with_its_tables(planned: tuple[Path, dict], tmp_path: Path) -> None:
    assert invoke(tmp_path, *PLANNED, "--budget", "6", "--json").exit_code == 0
    before = completed(tmp_path, "demo")
    again = invoke(tmp_path, *PLANNED, "--budget", "12", "--json")
    assert again.exit_code == 0, again.stderr
    assert "continuing study demo with 6 measured trials" in again.stderr
    after = completed(tmp_path, "demo")
    assert before.items() <= after.items()
    assert len(set(after.values())) == len(after) == 12
    # One picture of the tables beside one of every trial.
    assert len(list((tmp_path / "studies" / "demo.artifacts").iterdir())) == 13
    assert json.loads(again.stdout)["bound"]["trials"] == 12


def test_nothing_is_measured_while_kernels_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    for name in ("draft", "pipeline", "evaluate"):
        step = getattr(AnalyticEvaluator, name)
        monkeypatch.setattr(AnalyticEvaluator, name, lambda *given, name=name, step=step: steps.append(name) or step(*given))
    draft, tables = slow_if_depthwise(AnalyticEvaluator.draft), AnalyticEvaluator.tables

    def told(*given: Any) -> Draft:
        found = draft(*given)
        return replace(found, tables=lambda: steps.append("its tables") or found.tables())

    def measured(*given: Any) -> Tables:
        steps.append("tables")
        return tables(*given)

    monkeypatch.setattr(AnalyticEvaluator, "draft", told)
    monkeypatch.setattr(AnalyticEvaluator, "tables", measured)
    assert invoke(tmp_path, *PLANNED, "--budget", str(EARLY + 2)).exit_code == 0
    study, evaluator = handle_of(tmp_path).study, AnalyticEvaluator()
    uniform = len(uniform_anchors(bind_space(load_space("default"), evaluator.graph)))
    chosen = len([trial for trial in study.get_trials() if "anchor" in trial.user_attrs]) - uniform
    assert 0 < uniform < uniform + chosen < EARLY
    drafted = EARLY - uniform - chosen
    assert steps == [
        *("pipeline", *uniform * ["evaluate"]),
        *("draft", *chosen * ["evaluate"]),
        *("its tables", *drafted * ["evaluate"]),
        *("tables", "evaluate", "evaluate"),
    ]
    # Nothing is left to measure: no process either.
    steps.clear()
    assert invoke(tmp_path, *PLANNED, "--budget", "4").exit_code == 0
    assert steps == ["tables"]


def test_few_trials_need_no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = AnalyticEvaluator.tables
    monkeypatch.setattr(AnalyticEvaluator, "tables", lambda *given, **_: pytest.fail("tables were measured"))
    for budget in (EARLY - 1, EARLY, EARLY):
        result = invoke(tmp_path, *PLANNED, "--budget", str(budget), "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["bound"]["trials"] == budget
    assert table_rows(handle_of(tmp_path))
    monkeypatch.setattr(AnalyticEvaluator, "tables", tables)
    monkeypatch.setattr(AnalyticEvaluator, "draft", lambda *given: pytest.fail("they were drafted again"))
    assert invoke(tmp_path, *PLANNED, "--budget", str(EARLY + 2)).exit_code == 0
    evaluator = AnalyticEvaluator()
    space = bind_space(load_space("default"), evaluator.graph)
    assert table_rows(handle_of(tmp_path)) == layer_rows(space, evaluator.tables(space))
    trials = handle_of(tmp_path).study.get_trials(states=(TrialState.COMPLETE,))
    assert len({trial.user_attrs["config_hash"] for trial in trials}) == len(trials) == EARLY + 2


@pytest.mark.parametrize("given", [None, Path("table.json")])
def test_what_neighbours_cost_is_left_out_unless_times_are_given(monkeypatch: pytest.MonkeyPatch, given: Path | None) -> None:
    evaluator = AnalyticEvaluator()
    space = bind_space(load_space("default"), evaluator.graph)
    handle = StudyHandle(optuna.create_study(directions=["minimize"] * 3), "sqlite:///in-memory.db")
    asked: list[tuple[bool, list[Any]]] = []
    monkeypatch.setattr(evaluator, "tables", lambda space, mixed, tried: asked.append((mixed, tried)))
    in_float = space.config({one.name: "fp32" for one in space.layers})
    notes = {"config": in_float.to_json(), "measurement": {}}
    handle.study.add_trial(optuna.trial.create_trial(values=[1.0, 1.0, 1.0], user_attrs=notes))
    request: Any = SimpleNamespace(budget=20, settings=SimpleNamespace(cost_table=given))
    (_, early), (tables, late) = PlannedTrials(handle, request, space, evaluator, evaluator.baseline, 0).parts()
    tables()
    assert (early, late) == (EARLY, 20) and asked == [(given is not None, [in_float])]


def test_an_interrupt_in_the_tables_leaves_what_was_measured_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: Any, **_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(AnalyticEvaluator, "tables", interrupted)
        result = invoke(tmp_path, *PLANNED, "--budget", str(EARLY + 2))
    assert result.exit_code == 130
    measured = len(handle_of(tmp_path).study.get_trials(states=(TrialState.COMPLETE,)))
    assert measured == EARLY
    assert f"study demo is intact with {measured} measured trials, the same command continues it" in result.stderr
    assert invoke(tmp_path, *PLANNED, "--budget", str(EARLY + 2)).exit_code == 0
    assert len(handle_of(tmp_path).study.get_trials(states=(TrialState.COMPLETE,))) == EARLY + 2


def test_tables_may_take_longer_than_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    for owner, name in ((Watch, "beat"), (Watch, "rest"), (AnalyticEvaluator, "tables")):
        step = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, name=name, step=step, **more: steps.append(name) or step(*given, **more))
    assert invoke(tmp_path, *PLANNED, "--budget", str(EARLY + 1)).exit_code == 0
    before = steps[: steps.index("tables")]
    assert "beat" in before and before[-1] == "rest"


def test_a_search_that_ended_in_its_opening_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned_trials, "choose_opening", lambda space, *given: plain_anchors(space)[1:4])
    assert invoke(tmp_path, *PLANNED, "--budget", "1").exit_code == 0
    (first,) = handle_of(tmp_path).study.get_trials()
    assert first.state == TrialState.COMPLETE and set(first.user_attrs["config"]["precision"].values()) == {"int8"}
    assert invoke(tmp_path, *PLANNED, "--budget", "2").exit_code == 0
    first, second, *waiting = handle_of(tmp_path).study.get_trials()
    assert first.state == second.state == TrialState.COMPLETE
    assert waiting and all(trial.state == TrialState.WAITING and "anchor" in trial.user_attrs for trial in waiting)
    assert invoke(tmp_path, *PLANNED, "--budget", "12").exit_code == 0
    done = handle_of(tmp_path).study.get_trials(states=(TrialState.COMPLETE,))
    assert len(done) == 12
    assert ["anchor" in trial.user_attrs for trial in done] == [n < 2 + len(waiting) for n in range(12)]


def test_the_document_says_how_far_the_front_is_from_the_bound(planned: tuple[Path, dict]) -> None:
    folder, document = planned
    bound = document["bound"]
    assert list(bound) == ["hypervolume", "share", "trials"]
    assert bound["share"] == pytest.approx(document["hypervolume"] / bound["hypervolume"])
    assert json.loads(invoke(folder, "front", "--study", "demo", "--json").stdout) == document
    assert f"{bound['share']:.1%} of the" in invoke(folder, "front", "--study", "demo").stderr
    plain = invoke(folder, "search", "--sampler", "random", "--study", "plain", "--budget", "3", "--json")
    assert json.loads(plain.stdout)["bound"] is None
    assert "tables" not in plain.stderr


def test_the_bound_of_exact_tables_is_nearly_the_true_front() -> None:
    evaluator = AnalyticEvaluator()
    space = bind_space(load_space("default"), evaluator.graph)
    bound = tables_bound(space, evaluator.tables(space), [], {})
    best = {"calibration": "mse", "granularity": "channel_wise"}
    every = []
    for index in range(2**8):
        layers = {one.name: one.values[index >> i & 1] for i, one in enumerate(space.layers)}
        found = evaluator.evaluate(space.config({**best, **layers}))
        every.append((found.latency.median_ms, float(found.memory.peak_bytes), found.accuracy.top1_loss_pp))
    true = objective_hypervolume(np.array(every), evaluator.baseline)
    # Supported points alone: never more than there is, and not much less.
    assert 0.9 * true < bound.hypervolume <= true + 1e-9
    assert moocore.is_nondominated(bound.points).all()
    limited = tables_bound(space, evaluator.tables(space), [], {"top1_loss_pp": 0.5})
    assert 0 < limited.hypervolume < bound.hypervolume
    assert limited.points[:, 2].max() <= 0.5


def test_a_prediction_that_only_its_arena_saves_is_kept() -> None:
    """Beaten in latency, weights and loss, and yet on the front for the sake of the bytes beside the weights."""
    evaluator, seen = AnalyticEvaluator(), {}
    space = bind_space(load_space("default"), evaluator.graph)
    tables = evaluator.tables(space)

    def divergence(config: QuantConfig) -> PairwiseSum:
        found = tables.divergence(config)
        return found if config.granularity == "channel_wise" else PairwiseSum(found.unary[::-1], {})

    def bound(smallest: str) -> np.ndarray:
        def cost(config: QuantConfig) -> Cost:
            row = np.array([[one.values.index(config.precision[one.name]) for one in space.layers]])
            weights, nats = (
                tables.weight_bytes(row)[0],
                min(float(tables.divergence(config)(row)[0]), float(divergence(config)(row)[0])),
            )
            seen[config.content_hash()] = (tables.cost(config).latency_ms, weights, nats)
            return replace(tables.cost(config), peak_bytes=1 if config.content_hash() == smallest else 10_000 + int(weights))

        return tables_bound(space, replace(tables, divergence=divergence, cost=cost), [], {}).points

    bound("none")
    values = np.array(list(seen.values()))
    beaten = np.flatnonzero(~moocore.is_nondominated(values))
    assert len(beaten)
    assert bound(list(seen)[beaten[0]])[:, 1].min() == 1


def test_constraints_that_nothing_meets_end_with_the_closest_and_exit_code_3(tmp_path: Path) -> None:
    limits = ("--max-latency-ms", "0.5", "--max-loss-pp", "0")
    result = invoke(tmp_path, *PLANNED, "--budget", "10", "--json", *limits)
    assert result.exit_code == 3, result.stderr
    document = json.loads(result.stdout)
    assert document["front"] == [] and len(document["closest"]) == 3
    assert document["bound"] == {"hypervolume": 0.0, "share": None, "trials": 10}
    again = invoke(tmp_path, *PLANNED, "--budget", "12", *limits)
    assert again.exit_code == 3
    assert "no configuration is within latency_ms <= 0.5, top1_loss_pp <= 0; the closest are" in " ".join(again.stdout.split())


def test_a_space_without_a_choice_is_exhausted_by_its_one_configuration(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("version: 1\nskip: ['*']\n")
    result = invoke(tmp_path, *PLANNED, "--space", "one.yaml", "--json")
    assert result.exit_code == 0, result.stderr
    assert "stopping at 1 of 200" in result.stderr
    assert table_rows(handle_of(tmp_path)) == []


def test_a_note_that_the_user_has_changed_stays(planned: tuple[Path, dict], tmp_path: Path) -> None:
    dashboard = pytest.importorskip("optuna_dashboard")
    assert invoke(tmp_path, *PLANNED, "--budget", "1").exit_code == 0
    handle = handle_of(tmp_path)
    rows = [{**row, "divergence": 2 * row["divergence"]} for row in table_rows(handle)]
    attach_tables(handle, rows[:3])
    note = dashboard.get_note(handle.study)
    assert all((row["layer"] in note) == (row in rows[:3]) for row in rows)
    dashboard.save_note(handle.study, "mine")
    attach_tables(handle, rows)
    assert dashboard.get_note(handle.study) == "mine"
    assert table_rows(handle) == rows


@pytest.mark.slow
def test_a_real_planned_search(small: Path) -> None:
    # A trial that stops early is a matter of luck on so few images.
    options = (*PLANNED, *SMALL[1:-1], "planned", "--no-early-stopping", "--space", "full", "--json", "--budget")
    for file in (small / "studies" / "cache" / "kernels").glob("*time.json"):
        # Another test may have timed the kernels already.
        file.unlink()
    count = 15
    first = within(small, *options, str(count))
    assert first.returncode == 0, first.stderr
    assert "timing" in first.stderr and "uniform networks" in first.stderr
    done, handle = completed(small, "planned"), handle_of(small, "planned")
    assert len(done) == count and len(table_rows(handle)) == 3 * 3
    again = within(small, *options, str(count + 2))
    assert again.returncode == 0, again.stderr
    # Kernel times were kept, and a table that is measured twice would have other rows.
    assert "uniform networks" not in again.stderr
    assert table_rows(handle_of(small, "planned")) == table_rows(handle)
    assert len(set(completed(small, "planned").values())) == count + 2
    document = json.loads(again.stdout)
    assert document["bound"]["trials"] == count + 2
    assert {"uniform_costs", "sensitivity_table"} <= set(document["seconds"])
    trials = handle_of(small, "planned").study.get_trials(states=(TrialState.COMPLETE,))
    assert len(study_front(handle_of(small, "planned").study)) >= 1 and len(trials) == count + 2
