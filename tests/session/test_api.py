"""`qsearch.search`, the study that it returns, and what `import qsearch` costs."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from analytic import invoke, standing_in
from broken_networks import PREPROCESSING, Net
from image_folders import write_classes
from PIL import Image
from rich.console import Console

import qsearch
from qsearch.errors import QSearchError, StudyError, UsageError
from qsearch.session.trial_progress import _draws_bars


@pytest.fixture
def analytic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to search the analytic network in."""
    monkeypatch.chdir(tmp_path)
    with standing_in():
        yield tmp_path


def test_import_loads_nothing_heavy_until_a_name_is_used() -> None:
    code = (
        "import sys, qsearch; dir(qsearch); heavy = ('torch', 'tvm', 'optuna', 'numpy', 'typer', 'pydantic', 'PIL', 'rich'); "
        "print([name for name in heavy if name in sys.modules], sorted(name for name in sys.modules if name[:8] == 'qsearch.')); "
        "qsearch.QSearchError; print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] []\n[]\n"


def test_public_names() -> None:
    assert sorted(qsearch.__all__) == ["Point", "QSearchError", "QuantConfig", "Study", "open_study", "search"]
    assert set(qsearch.__all__) <= set(dir(qsearch))
    for name in qsearch.__all__:
        assert callable(getattr(qsearch, name)), name
    with pytest.raises(AttributeError, match="nix"):
        _ = qsearch.nix
    # The room of the same name is still one, and called it is the function.
    assert isinstance(qsearch.search, types.ModuleType)
    assert (Path(qsearch.__file__).parent / "py.typed").is_file()


def test_a_search_from_python_is_that_of_the_command(analytic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = qsearch.search("demo", budget=6, seed=3)
    said = capsys.readouterr().err
    assert "trial 6 of 6" in said and "hypervolume" in said
    assert repr(study) == f"Study('demo', 'sqlite:///studies/demo.db'): {len(study.front)} points of 6 measured trials"
    document = json.loads(invoke(analytic, "front", "--study", "demo", "--json").stdout)
    assert study.document == document
    for point, told in zip(study.front, document["front"], strict=True):
        assert (point.trial, point.latency_ms, point.peak_bytes) == (told["trial"], told["latency_ms"], told["peak_bytes"])
        assert point.loss_pp == told["top1_loss_pp"] and list(point.loss_ci_pp) == told["top1_loss_ci_pp"]
        assert point.config.to_json() == told["config"] and point.metrics["heldout"] == told["heldout"]
    # The command continues what Python began, and the other way round.
    assert invoke(analytic, "search", "--budget", "7", "--seed", "3").exit_code == 0
    again = qsearch.search("demo", budget=8, seed=3, progress=False)
    assert again.document["trials"]["complete"] == 8
    assert qsearch.open_study("demo").document == again.document


def test_a_quiet_search_says_nothing(analytic: Path, capfd: pytest.CaptureFixture[str]) -> None:
    qsearch.search("demo", budget=2, progress=False)
    assert capfd.readouterr().err == ""


def test_what_a_notebook_shows(analytic: Path) -> None:
    study = qsearch.search("demo", budget=6, progress=False)
    shown = study._repr_html_()
    assert shown.count("<tr>") == len(study.front) + 1
    assert all(f"{point.latency_ms:.3f}" in shown for point in study.front)
    picture = study.plot()
    assert isinstance(picture, Image.Image) and picture._repr_png_().startswith(b"\x89PNG")
    assert study.report("report.html", "figures").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (analytic / "figures" / "front-latency.png").is_file()


def test_constraints_that_nothing_meets_leave_the_closest(analytic: Path) -> None:
    study = qsearch.search("demo", budget=4, max_latency_ms=0.1, progress=False)
    assert study.front == () and len(study.closest) == 3
    assert "none within its constraints" in study._repr_html_()
    with pytest.raises(StudyError, match="the front is empty"):
        study.export("fastest", "out")


def test_an_interrupted_search_is_continued(analytic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TROUBLE", "interrupt")
    monkeypatch.setenv("TROUBLE_AT", "3")
    with pytest.raises(KeyboardInterrupt):
        qsearch.search("demo", budget=5, progress=False)
    assert qsearch.open_study("demo").document["trials"]["complete"] == 2
    monkeypatch.delenv("TROUBLE")
    assert qsearch.search("demo", budget=5, progress=False).document["trials"]["complete"] == 5


REFUSED = {
    "option": ({"budgett": 3}, "no option 'budgett'; did you mean 'budget'"),
    "task": ({"task": "nix"}, "unknown task 'nix'"),
    "budget": ({"budget": 0}, "1 or more, got 0"),
    "timeout": ({"timeout": -1.0}, "0 or more, got -1.0"),
    "sampler": ({"sampler": "nix"}, "nsgaii"),
    "space": ({"space": "nix"}, "precision_preserving"),
    "limit": ({"max_loss_pp": -1.0}, "--max-loss-pp must be"),
    "study": ({"study": "../x"}, "study's name"),
    "model": ({"model": 3}, "got int"),
    "classes": ({"classes": ["a"]}, "brings its own classes"),
    "preprocessing": ({"preprocessing": PREPROCESSING}, "brings its own preprocessing"),
}


@pytest.mark.parametrize("given, words", REFUSED.values(), ids=REFUSED.keys())
def test_refusals_are_errors_of_qsearch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        qsearch.search(**given)
    assert words in str(caught.value) and isinstance(caught.value, QSearchError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_module_is_searched_exported_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "data")
    net = Net().train()
    options = {
        "budget": 2,
        "preprocessing": PREPROCESSING,
        "early_stopping": False,
        "jobs": 1,
        "progress": False,
        "sampler": "random",
    }
    study = qsearch.search(net, tmp_path / "data", **options)
    assert net.training
    assert study.name.startswith("Net-") and [file.stem for file in Path("studies/models").iterdir()] == [study.name]
    assert set(study.front[0].config.precision) == {"first", "second", "head"}
    # Measured again and exported, both of which open the model anew.
    assert study.front[0].metrics["heldout"] is not None
    bundle = study.export(study.front[0].trial, "bundle")
    assert json.loads((bundle / "metrics.json").read_text())["trial"] == study.front[0].trial
    # Another instance with the same content continues the study; other weights are another model.
    assert qsearch.search(Net(), tmp_path / "data", **options).document == study.document
    with pytest.raises(UsageError, match="brings its own weights"):
        qsearch.search(net, tmp_path / "data", weights="w.pth")


def test_bars_are_drawn_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _draws_bars(Console(force_terminal=True))
    assert not _draws_bars(Console(force_terminal=False, force_jupyter=False))
    notebook = Console(force_terminal=False, force_jupyter=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not _draws_bars(notebook)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert _draws_bars(notebook)
