"""Notes and pictures of trials, tables for the terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from analytic import AnalyticEvaluator, make_graph
from optuna.trial import TrialState
from PIL import Image
from rich.console import Console

from qsearch.config import Calibration, PrecisionName, QuantConfig
from qsearch.report.notes import TrialNotes, calibration_text, note_text, write_note
from qsearch.report.pictures import COLOURS, LayerBar, byte_text, draw_precisions, layer_bars
from qsearch.report.tables import EvaluateRow, evaluate_table, front_table, hidden_speedups
from qsearch.search.bound_space import bind_space
from qsearch.search.front import study_front
from qsearch.search.loop.driver import Limits, SearchProblem, run_search
from qsearch.search.space import load_space
from qsearch.search.study import Identity, study_to_search
from qsearch.search.study_trials import finished


def test_picture_shows_every_layer_in_its_colour() -> None:
    graph = make_graph(12)
    config = QuantConfig(precision={"classifier": "fp32"})
    bars = layer_bars(graph, config)
    assert [bar.precision for bar in bars] == ["int8"] * 11 + ["fp32"]
    assert bars[0].weight_bytes == 8 * 8 * 9
    assert bars[-1].weight_bytes == 4 * 10 * 8 * 14 * 14
    image = draw_precisions(bars, "demo, trial 3")
    colours = {colour for _, colour in image.getcolors(1 << 20) or []}
    assert {tuple(bytes.fromhex(COLOURS[name][1:])) for name in ("int8", "fp32")} <= colours


@pytest.mark.parametrize("count", [1, 200])
def test_pictures_of_small_and_deep_networks(count: int) -> None:
    image = draw_precisions([LayerBar(f"block.{index}", "int8", 0 if index else 1) for index in range(count)], "t")
    assert image.width >= 20 * count


def test_byte_text() -> None:
    assert [byte_text(size) for size in (0, 640, 1000, 12_800, 999_000, 4_100_000)] == [
        "0 B",
        "640 B",
        "1 kB",
        "12.8 kB",
        "999 kB",
        "4.1 MB",
    ]


def test_notes_and_pictures_of_a_search(tmp_path: Path) -> None:
    dashboard = pytest.importorskip("optuna_dashboard")
    evaluator = AnalyticEvaluator()
    with study_to_search("demo", Identity({"model": "a"}), f"sqlite:///{tmp_path}/a.db") as handle:
        notes = TrialNotes(handle, evaluator.graph, evaluator.baseline)
        run_search(
            handle, SearchProblem(bind_space(load_space("default"), evaluator.graph), evaluator.evaluate, notes), Limits(3)
        )
        for trial in finished(handle.study):
            storage = handle.study._storage
            body = dashboard._note.get_note_from_system_attrs(storage.get_study_system_attrs(1), trial._trial_id)["body"]
            assert "| latency, ms |" in body
            name = body.rsplit("/", 1)[1].rstrip(")")
            assert Image.open(tmp_path / "demo.artifacts" / name).format == "PNG"


def test_long_notes_reach_the_dashboard_whole(tmp_path: Path) -> None:
    dashboard = pytest.importorskip("optuna_dashboard")
    text = "ü" * 5000
    with study_to_search("demo", Identity({"model": "a"}), f"sqlite:///{tmp_path}/a.db") as handle:
        trial = handle.study.ask()
        write_note(trial, text)
        assert dashboard.get_note(trial) == text


def test_note_text() -> None:
    evaluator = AnalyticEvaluator()
    precision: dict[str, PrecisionName] = {layer.name: "int8" for layer in evaluator.graph.layers}
    precision["classifier"] = "fp32"
    config = QuantConfig(precision=precision, calibration=Calibration(mode="percentile", percentile=99.95))
    text = note_text(config, evaluator.evaluate(config), evaluator.baseline)
    assert "1 fp32, 7 int8" in text
    assert "percentile 99.95, channel_wise" in text
    assert "times** as fast as float" in text
    assert text.endswith("- kernels: kkkkkkkkkkkk")
    assert "- timing" not in text
    measured = evaluator.evaluate(config)
    paired = replace(measured, latency=replace(measured.latency, ratio=0.5, raw_ms=4.0, noisy=True))
    text = note_text(config, paired, evaluator.baseline)
    words = "- timing: 0.500 of float in turns with it, 4.000 ms of the thread's processor time; **too noisy to rely on**"
    assert words in text
    on_two = replace(paired, latency=replace(paired.latency, threads=2, noisy=False))
    assert note_text(config, on_two, evaluator.baseline).splitlines()[-2].endswith("in turns with it, 4.000 ms on the wall")


def test_calibration_text() -> None:
    int8: dict[str, PrecisionName] = {"a": "int8"}
    assert calibration_text(QuantConfig(precision={"a": "fp32"})) == "none, all fp32"
    power = QuantConfig(
        precision=int8, weight_scale="power_of_two", granularity="layer_wise", calibration=Calibration(mode="mse")
    )
    assert calibration_text(power) == "mse, layer_wise, power_of_two"
    fine = QuantConfig(precision=int8, calibration=Calibration(mode="percentile", percentile=99.99987))
    assert calibration_text(fine) == "percentile 99.99987, channel_wise"
    assert calibration_text(QuantConfig(precision=int8, calibration=Calibration(mode="global_scale"))).startswith(
        "global_scale 8"
    )


def test_pictures_that_others_are_writing_are_left_alone(tmp_path: Path) -> None:
    evaluator = AnalyticEvaluator()
    with study_to_search("demo", Identity({"model": "a"}), f"sqlite:///{tmp_path}/a.db") as handle:
        TrialNotes(handle, evaluator.graph, evaluator.baseline)
        stray = tmp_path / "demo.artifacts" / "00000000-0000-0000-0000-000000000000"
        stray.write_bytes(b"half a picture")
        trial = handle.study.ask()
        TrialNotes(handle, evaluator.graph, evaluator.baseline)
        assert stray.exists()
        handle.study.tell(trial, state=TrialState.FAIL)
        TrialNotes(handle, evaluator.graph, evaluator.baseline)
        assert not stray.exists()


def text_of(table: object) -> str:
    """A table as plain text."""
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_tables(tmp_path: Path) -> None:
    evaluator = AnalyticEvaluator()
    with study_to_search("demo", Identity({"model": "a"}), f"sqlite:///{tmp_path}/a.db") as handle:
        run_search(handle, SearchProblem(bind_space(load_space("default"), evaluator.graph), evaluator.evaluate), Limits(4))
        text = text_of(front_table(study_front(handle.study), evaluator.baseline, "front"))
    assert "float" in text
    assert "none, all fp32" in text
    text = text_of(evaluate_table([EvaluateRow("int8", 1.234, 56_700, 2.5, 91.5, 99.25, 500)], "demo, 500 images"))
    assert all(part in text for part in ("int8", "1.234", "56.7 kB", "2.50x", "91.50", "99.25"))


def test_a_table_of_batches_tells_throughput_and_what_one_image_hides() -> None:
    def row(precision: str, batch: int, latency_ms: float, speedup: float) -> EvaluateRow:
        return EvaluateRow(precision, latency_ms, 1000, speedup, 90.0, 99.0, 500, batch=batch)

    rows = [
        *(row("fp32", 1, 1.0, 1.0), row("fp32", 8, 8.0, 1.0)),
        # Three quarters of it stay the same.
        *(row("int8", 1, 0.8, 1.25), row("int8", 8, 2.2, 3.64)),
        # All of it grows.
        *(row("w4a8", 1, 0.5, 2.0), row("w4a8", 8, 4.0, 2.0)),
    ]
    text = text_of(evaluate_table(rows, "demo"))
    assert all(part in text for part in ("batch", "images/s", "3636"))
    (sentence,) = hidden_speedups(rows)
    assert sentence.startswith("int8: 75 % of its time at batch 1") and "3.64 times at batch 8" in sentence
    assert hidden_speedups(rows[2:3]) == hidden_speedups(rows[3:4]) == []
    assert "batch" not in text_of(evaluate_table(rows[:1], "demo"))


def test_methods_are_told_in_words() -> None:
    config = QuantConfig.model_validate(
        {
            "granularity": "group_wise",
            "weight_symmetry": "asymmetric",
            "rounding": "second_order",
            "bias_correction": "measured",
            "equalization": True,
            "migration": 0.5,
            "rules": [{"position": "last", "precision": "int8"}],
        }
    )
    assert calibration_text(config) == (
        "max, group_wise, asymmetric weights, second order rounding, measured bias correction, equalized, migration 0.5, 1 rule"
    )
