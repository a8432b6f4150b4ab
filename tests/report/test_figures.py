"""Figures of a report as pictures and tables."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from analytic import invoke
from hostile_study import NAMES, hostile_study
from PIL import Image

from qsearch.errors import UsageError
from qsearch.report.figures import write_figures
from qsearch.report.page_document import page_document
from qsearch.search.study import load_study


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_every_figure_has_a_picture_and_a_table(tmp_path: Path) -> None:
    assert invoke(tmp_path, "search", "--budget", "8").exit_code == 0
    document = page_document(load_study("demo", f"sqlite:///{tmp_path}/studies/demo.db"))
    files = write_figures(document, tmp_path / "figures")
    names = ("front-latency", "front-bytes", "precisions", "heldout", "history", "layers")
    assert sorted(file.name for file in files) == sorted(f"{name}.{kind}" for name in names for kind in ("csv", "png"))
    for name in names:
        assert min(Image.open(tmp_path / "figures" / f"{name}.png").size) > 100
    front = rows(tmp_path / "figures" / "front-latency.csv")
    assert sum(row["kind"] == "front" for row in front) == len(document["study"]["front"])
    assert sum(row["kind"] == "float" for row in front) == 1
    assert len(front) == 9
    assert [row["layer"] for row in rows(tmp_path / "figures" / "precisions.csv")] == [one["name"] for one in document["layers"]]
    assert len(rows(tmp_path / "figures" / "history.csv")) == 8
    again = rows(tmp_path / "figures" / "heldout.csv")
    # The stand-in measures again with a quarter of a point more.
    assert all(float(row["heldout_loss_pp"]) - float(row["loss_pp"]) in (0.0, pytest.approx(0.25)) for row in again)


def test_names_with_line_ends_and_an_empty_front(tmp_path: Path) -> None:
    written = write_figures(page_document(hostile_study(tmp_path)), tmp_path / "figures")
    assert {file.stem for file in written} >= {"front-latency", "precisions", "history", "layers"}
    assert [row["layer"] for row in rows(tmp_path / "figures" / "precisions.csv")] == list(NAMES)
    assert invoke(tmp_path, "search", "--timeout", "0").exit_code == 0
    empty = page_document(load_study("demo", f"sqlite:///{tmp_path}/studies/demo.db"))
    assert {file.stem for file in write_figures(empty, tmp_path / "empty")} <= {"layers"}


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UsageError, match="--figures"):
        write_figures(page_document(hostile_study(tmp_path, ("a", "b", "c"))), tmp_path / "taken")
