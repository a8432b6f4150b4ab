"""Two configurations of a model against each other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from analytic import invoke
from hostile_study import NAMES, hostile_study

from qsearch.config import QuantConfig
from qsearch.errors import QSearchError, UsageError
from qsearch.session.compared import Compared, open_compared
from qsearch.session.comparison import comparison_document

LAYERS = [{"name": name, "type": kind, "weights": 1} for name, kind in (("a", "conv"), ("b", "depthwise"), ("c", "dense"))]


def side(config: Mapping[str, Any], **options: Any) -> Compared:
    return Compared("one", "configuration", QuantConfig.model_validate(config), **options)


def differing(one: Compared, other: Compared) -> dict[str, dict[str, Any]]:
    return {layer["layer"]: layer["differences"] for layer in comparison_document(one, other)["layers"]["differ"]}


def test_precisions_are_told_layer_by_layer_in_the_order_of_the_network() -> None:
    one = side({"precision": {"c": "fp32"}}, layers=LAYERS)
    other = side({"precision": {"a": "int16"}})
    document = comparison_document(one, other)
    assert [layer["layer"] for layer in document["layers"]["differ"]] == ["a", "c"]
    assert document["layers"]["count"] == 3 and document["layers"]["alike"] == 1
    assert document["layers"]["differ"][1] == {
        "layer": "c",
        "type": "dense",
        "a": "fp32",
        "b": "int8",
        # Float has no scales that could differ.
        "differences": {"precision": ["fp32", "int8"]},
    }
    assert document["methods"] == {} and document["metrics"] == []


def test_methods_are_told_once_and_of_layers_only_what_is_beyond() -> None:
    one = side({"calibration": {"mode": "mse"}}, layers=LAYERS)
    other = side({"calibration": {"mode": "max"}, "rules": [{"types": ["dense"], "granularity": "layer_wise"}]}, layers=LAYERS)
    document = comparison_document(one, other)
    assert [value["mode"] for value in document["methods"]["calibration"]] == ["mse", "max"]
    assert differing(one, other) == {"c": {"granularity": ["channel_wise", "layer_wise"]}}
    assert differing(one, one) == {}


def test_without_layers_names_are_compared_and_the_default_fills_in() -> None:
    whole = side({"precision": {"a": "int8", "b": "fp32", "c": "int8"}})
    assert differing(whole, side({"precision": {"c": "fp32"}})) == {
        "b": {"precision": ["fp32", "int8"]},
        "c": {"precision": ["int8", "fp32"]},
    }
    with pytest.raises(UsageError, match="rules or skips"):
        comparison_document(whole, side({"skip": ["a*"]}))
    assert differing(side({"precision": {"c": "int8"}}, layers=LAYERS), side({"skip": ["a*"]})) == {
        "a": {"precision": ["int8", "fp32"]}
    }


OTHER_MODELS = {
    "fingerprints": (side({}, identity={"model": "m" * 64}), side({}, identity={"model": "n" * 64}), "by weights or structure"),
    "layers": (side({}, layers=LAYERS), side({}, layers=LAYERS[:2]), "their layers are not the same"),
    "a name": (side({}, layers=LAYERS), side({"precision": {"z": "int8"}}), "does not have: 'z'"),
    "names": (side({"precision": {"a": "int8"}}), side({"precision": {"z": "int8"}}), "do not name the same layers"),
}


@pytest.mark.parametrize("one, other, words", OTHER_MODELS.values(), ids=OTHER_MODELS.keys())
def test_other_models_are_refused(one: Compared, other: Compared, words: str) -> None:
    for pair in ((one, other), (other, one)):
        with pytest.raises(UsageError, match=words):
            comparison_document(*pair)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two studies of one model, one of another, one that nothing satisfies, and a configuration."""
    folder = tmp_path_factory.mktemp("compared")
    assert invoke(folder, "search", "--budget", "8").exit_code == 0
    assert invoke(folder, "search", "--study", "careful", "--space", "precision_preserving", "--budget", "4").exit_code == 0
    assert invoke(folder, "search", "--study", "foreign", "--budget", "2", MODEL="n" * 64).exit_code == 0
    assert invoke(folder, "search", "--study", "tight", "--budget", "3", "--max-latency-ms", "0.1").exit_code == 3
    (folder / "mine.json").write_text(json.dumps({"default_precision": "int8", "skip": ["classifier"]}))
    return folder


def test_two_studies(folder: Path) -> None:
    result = invoke(folder, "compare", "demo", "careful", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    front = json.loads(invoke(folder, "front", "--study", "demo", "--json").stdout)
    assert document["a"]["front"] == {
        "points": len(front["front"]),
        "hypervolume": front["hypervolume"],
        "trials": front["trials"],
    }
    point = next(one for one in front["front"] if f"trial {one['trial']} (knee)" in document["a"]["title"])
    rows = {row["name"]: row for row in document["metrics"]}
    assert rows["latency_ms"]["a"] == point["latency_ms"] and rows["peak_bytes"]["a"] == point["peak_bytes"]
    assert rows["top1_loss_pp"]["a_interval"] == point["top1_loss_ci_pp"]
    assert rows["heldout_top1_loss_pp"]["a"] == point["heldout"]["top1_loss_pp"]
    low, high = rows["top1_loss_pp"]["a_interval"], rows["top1_loss_pp"]["b_interval"]
    assert rows["top1_loss_pp"]["apart"] == (low[1] < high[0] or high[1] < low[0])
    a, b = (document[one]["config"]["precision"] for one in ("a", "b"))
    assert {layer["layer"] for layer in document["layers"]["differ"] if layer["a"] != layer["b"]} == {
        name for name in a if a[name] != b[name]
    }
    assert document["remarks"] == []
    text = invoke(folder, "compare", "demo", "careful").stdout
    assert "hypervolume" in text and "held-out loss, pp" in text and "b: study careful" in text


def test_trials_picks_and_a_configuration(folder: Path) -> None:
    alike = invoke(folder, "compare", "demo:0", "demo:0")
    assert alike.exit_code == 0 and "all 8 layers are alike" in alike.stdout
    with_file = invoke(folder, "compare", "demo:fastest", "mine.json")
    assert with_file.exit_code == 0, with_file.stderr
    assert "classifier" in with_file.stdout and "nothing was measured of it" in with_file.stdout
    # A trial that is not on the front can be named.
    assert invoke(folder, "compare", "tight:0", "demo:0").exit_code == 0


REFUSED = {
    "neither": ("nix", 2, "no study database"),
    "a directory": ("studies", 2, "no manifest.json"),
    "a file": ("nix.json", 2, "cannot read configuration"),
    "a trial": ("demo:99", 1, "no completed trial 99"),
    "a pick": ("demo:nix", 2, "no way to pick 'nix'"),
    "a path": ("../demo", 2, "nothing to compare"),
    "an empty front": ("tight", 1, "tight:TRIAL"),
    "another model": ("foreign", 2, "of different models"),
}


@pytest.mark.parametrize("given, code, words", REFUSED.values(), ids=REFUSED.keys())
def test_refusals(folder: Path, given: str, code: int, words: str) -> None:
    for pair in ((given, "demo"), ("demo", given)):
        result = invoke(folder, "compare", *pair)
        assert result.exit_code == code, result.stderr
        assert words in " ".join(result.stderr.split()) and "Traceback" not in result.stderr
        assert result.stdout == ""


def test_a_damaged_bundle(folder: Path) -> None:
    (folder / "damaged").mkdir(exist_ok=True)
    (folder / "damaged" / "manifest.json").write_text("{")
    result = invoke(folder, "compare", "damaged", "demo")
    assert result.exit_code == 1 and "manifest.json is damaged" in " ".join(result.stderr.split())


def test_hostile_names_and_an_older_version(tmp_path: Path) -> None:
    handle = hostile_study(tmp_path, old=True)
    document = comparison_document(open_compared("hostile:0", handle.url), open_compared("hostile:1", handle.url))
    assert document["layers"]["count"] == len(NAMES)
    result = invoke(tmp_path, "compare", "hostile:0", "hostile:1", "--storage", handle.url)
    assert result.exit_code == 0, result.stderr
    assert "<!--<script>" in result.stdout


def test_a_study_that_has_measured_nothing(tmp_path: Path) -> None:
    with pytest.raises(QSearchError):
        open_compared("nix", f"sqlite:///{tmp_path}/nix.db")
