"""`tables`: what every layer costs and does to the outputs, as text, JSON and a picture."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from real_search import SMALL, fails, within

from qsearch.build.target import open_target

TABLES = ("tables", *SMALL[1:5])
LAYERS = ("first", "second", "head")


def test_as_json_and_as_a_picture(small: Path) -> None:
    result = within(small, *TABLES, "--json", "--plot", "tables.png")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    rows = document["layers"]
    assert document["model"] == "broken_networks:Net"
    assert {"cost_table", "sensitivity_table"} <= set(document["seconds"])
    assert {row["layer"]: row["position"] for row in rows} == {name: i for i, name in enumerate(LAYERS)}
    assert [row["divergence"] for row in rows] == sorted((row["divergence"] for row in rows), reverse=True)
    assert all(row["precision"] == "int8" and row["divergence"] > 0 and row["weight_bytes"] < 0 for row in rows)
    picture = Image.open(small / "tables.png")
    assert picture.format == "PNG" and picture.height > 400


def test_as_text(small: Path) -> None:
    result = within(small, *TABLES)
    assert result.returncode == 0, result.stderr
    assert "layers of broken_networks:Net, most sensitive first" in result.stdout
    assert all(name in result.stdout for name in (*LAYERS, "divergence, nats", "latency, us"))
    # Measured once; only the float module, whose latency scales all others, is measured by every process.
    again = within(small, *TABLES).stdout

    def without_latencies(table: str) -> str:
        return re.sub(r" +[+-]\d+\.\d ", " ", table)

    assert without_latencies(again) == without_latencies(result.stdout) != result.stdout


def test_every_precision_of_the_space(small: Path) -> None:
    names = open_target("host").precisions
    (small / "all.yaml").write_text(f"version: 1\nprecisions:\n  default: [{', '.join(names)}]\nskip: [head]\n")
    result = within(small, *TABLES, "--space", "all.yaml", "--json", "--plot", "all.png")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["layers"]
    assert {(row["layer"], row["precision"]) for row in rows} == {
        (layer, name) for layer in ("first", "second") for name in names if name != "fp32"
    }
    nats = {(row["layer"], row["precision"]): row["divergence"] for row in rows}
    assert min(nats.values()) > 0


BAD = {
    "no such model": (2, ("--model", "nowhere:Net"), "nowhere"),
    "no such space": (2, ("--space", "nix"), "precision_preserving"),
    "no PNG": (2, ("--plot", "tables.jpeg"), "tables.png"),
    "no such folder": (2, ("--plot", "nowhere/tables.png"), "directory that exists"),
    "a directory": (2, ("--plot", "folder.png"), "PNG file"),
    "not writable": (2, ("--plot", "/proc/tables.png"), "cannot be written"),
    "a long name": (1, ("--plot", f"{'n' * 300}.png"), "give a shorter name"),
    "nothing to choose": (2, ("--space", "fixed.yaml"), "leaves no layer"),
    "no images": (2, ("--model", "efficientnet_lite0"), "--data"),
}


@pytest.mark.parametrize("code, options, part", BAD.values(), ids=BAD.keys())
def test_bad_input(small: Path, code: int, options: tuple[str, ...], part: str) -> None:
    (small / "folder.png").mkdir(exist_ok=True)
    (small / "fixed.yaml").write_text("version: 1\nskip: ['*']\n")
    given = () if part == "--data" else TABLES[1:]
    fails(small, code, (part,), "tables", *given, *options)
