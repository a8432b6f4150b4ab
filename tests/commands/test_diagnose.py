"""`diagnose`: networks with a known fault are given the remedy for it; text, JSON and picture; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lossy_networks
import optuna
import pytest
from lossy_networks import write_labelled
from optuna.trial import TrialState
from PIL import Image
from real_search import completed, fails, within

from qsearch.config import QuantConfig, load_config

KEYS = ["model", "study", "trial", "target", "config", "accuracy", "peak_bytes", "weight_bytes", "layers", "layer_images"]
KEYS += ["clipped", "dead_channels", "coverage", "remedies", "unchanged", "skipped", "failed", "first", "seconds"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of networks' images; the networks' kernels are the same."""
    root = tmp_path_factory.mktemp("lossy")
    for name in ("Plain", "Outlier"):
        write_labelled(root / name, getattr(lossy_networks, name)())
    return root


def diagnosed(folder: Path, network: str, config: dict[str, Any], *options: str) -> dict[str, Any]:
    """The document of a diagnosis."""
    (folder / "config.json").write_text(json.dumps(config))
    given = ("--model", f"lossy_networks:{network}", "--data", network, "--config", "config.json", "--worst", "1", *options)
    result = within(folder, "diagnose", *given, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_an_outlier_channel_needs_scales_of_channels(folder: Path) -> None:
    found = diagnosed(folder, "Outlier", {"granularity": "layer_wise"}, "--plot", "outlier.png", "--save", "better.json")
    assert list(found) == KEYS
    low, _ = found["accuracy"]["top1_loss_ci_pp"]
    assert low > 10 and found["accuracy"]["images"] == 108
    worst = found["layers"][0]
    assert worst["layer"] == "first" and worst["weight_share"] > 0.9 > 0.1 > worst["activation_share"]
    assert [one["kind"] for one in found["dead_channels"]] == ["rounded_away"]
    remedies = {one["name"]: one for one in found["remedies"]}
    channel_wise = remedies["granularity channel_wise"]
    assert found["first"] == {key: channel_wise[key] for key in ("name", "kind", "change")}
    assert channel_wise["change"] == {"granularity": "channel_wise"}
    assert found["remedies"][0]["gain_pp"] - channel_wise["gain_pp"] < 3 and channel_wise["helps"]
    assert channel_wise["gain_pp"] == pytest.approx(channel_wise["loss_before_pp"] - channel_wise["loss_pp"])
    assert remedies["fp32 in first"]["helps"] and remedies["fp32 in first"]["change"] == {"precision": {"first": "fp32"}}
    assert not remedies["calibration percentile 99.99"]["helps"]
    gains = [one["gain_pp"] for one in found["remedies"]]
    assert gains == sorted(gains, reverse=True)
    assert "migration 0.5" in found["unchanged"] and not found["skipped"] and not found["failed"]
    assert load_config(folder / "better.json") == QuantConfig()
    picture = Image.open(folder / "outlier.png")
    assert picture.format == "PNG" and picture.height > 900


def test_clipped_values_need_another_calibration(folder: Path) -> None:
    found = diagnosed(folder, "Plain", {"calibration": {"mode": "percentile", "percentile": 70.0}})
    assert {one["value"] for one in found["clipped"]} >= {"first", "second"}
    assert all(one["share"] > 0.1 for one in found["clipped"])
    assert found["accuracy"]["top1_loss_ci_pp"][0] > 3
    assert found["first"]["kind"] == found["remedies"][0]["kind"] == "calibration"
    assert "mode" in found["first"]["change"]["calibration"]


def test_as_text_with_little_time(folder: Path) -> None:
    (folder / "config.json").write_text('{"granularity": "layer_wise"}')
    given = (
        "--model",
        "lossy_networks:Outlier",
        "--data",
        "Outlier",
        "--config",
        "config.json",
        "--seconds",
        "1",
        "--images",
        "2",
    )
    result = within(folder, "diagnose", *given)
    assert result.returncode == 0, result.stderr
    assert "config.json of lossy_networks:Outlier: top-1" in result.stdout and "95 % interval" in result.stdout
    assert "chosen: 3·int8, calibration max, layer_wise, weight scale max" in result.stdout
    assert "all weights became zero by rounding: 'first'" in result.stdout
    assert "clipped: nothing" in result.stdout and "the layers that cost most, 3 of 3, on 2 images" in result.stdout
    assert "not tried, as they would not fit into 1 seconds" in result.stdout
    assert "running float and the configuration" in result.stderr


def test_a_trial_of_a_study(small: Path) -> None:
    trial = next(
        number
        for number in completed(small, "small")
        if "int8" in trials_of(small)[number].user_attrs["config"]["precision"].values()
    )
    result = within(small, "diagnose", "--study", "small", "--trial", str(trial), "--json", "--seconds", "1", "--images", "2")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert list(found) == KEYS
    assert found["study"] == "small" and found["trial"] == trial and found["model"] == "broken_networks:Net"
    measured = trials_of(small)[trial].user_attrs["measurement"]["accuracy"]
    assert found["accuracy"]["top1_loss_pp"] == measured["top1_loss_pp"]


def trials_of(folder: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="small", storage=f"sqlite:///{folder}/studies/small.db").get_trials()


def test_trials_without_a_loss(small: Path) -> None:
    study = optuna.load_study(study_name="small", storage=f"sqlite:///{small}/studies/small.db")
    numbers = {}
    for what, state, attributes in (
        ("failed", TrialState.FAIL, {"error": "the range of 'x' is empty"}),
        ("stopped", TrialState.PRUNED, {"stopped_early": "after 64 images"}),
        ("duplicate", TrialState.PRUNED, {}),
    ):
        study.add_trial(optuna.trial.create_trial(state=state, user_attrs=attributes))
        numbers[what] = str(len(study.get_trials()) - 1)
    given = ("diagnose", "--study", "small", "--trial")
    fails(small, 1, ("failed: the range of 'x' is empty", "--config"), *given, numbers["failed"])
    fails(small, 1, ("stopped early (after 64 images)", "--config"), *given, numbers["stopped"])
    fails(small, 1, ("is pruned, not complete",), *given, numbers["duplicate"])
    fails(small, 1, ("no completed trial 999",), *given, "999")


BAD = {
    "neither": ((), "either --study"),
    "both": (("--study", "small", "--config", "int8"), "either --study"),
    "trial without study": (("--config", "int8", "--trial", "1"), "give --study too"),
    "a model beside a study": (("--study", "small", "--model", "efficientnet_lite0"), "--model contradict --study"),
    "no such file": (("--config", "nowhere.json"), "nowhere.json"),
    "no such precision": (("--config", "int7"), "int7"),
    "no PNG": (("--config", "int8", "--plot", "a.jpeg"), "diagnosis.png"),
    "no JSON": (("--config", "int8", "--save", "nowhere/a.json"), "directory that exists"),
    "all float": (("--config", "fp32", "--model", "broken_networks:Net", "--data", "data"), "nothing to diagnose"),
    "no such layer": (("--config", "stray.json", "--model", "broken_networks:Net", "--data", "data"), "'secnod'; did you mean"),
}


@pytest.mark.parametrize("options, part", BAD.values(), ids=BAD.keys())
def test_bad_input(small: Path, options: tuple[str, ...], part: str) -> None:
    (small / "stray.json").write_text('{"precision": {"secnod": "fp32"}}')
    fails(small, 2, (part,), "diagnose", *options)


def test_no_such_study(small: Path) -> None:
    fails(small, 1, ("nowhere",), "diagnose", "--study", "nowhere")
