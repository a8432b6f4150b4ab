"""A search for a device that is not here: packed, measured, searched against the table, exported; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from real_search import SMALL, fails, trials, within

from qsearch.build.target import open_target
from qsearch.export import verify
from qsearch.measure.devices.cost_file import read_cost_file

MODEL = SMALL[1:5]
TARGET = "portable"


@pytest.fixture(scope="module")
def away(small: Path) -> Path:
    """The folder of the smallest network, with a pack of its kernels and the table that it gives."""
    packed = within(small, "pack", *MODEL, "--target", TARGET, "--tiles", "2", "--out", "kernels.pack", "--json")
    assert packed.returncode == 0, packed.stderr
    assert json.loads(packed.stdout)["left_out"] == 0
    measured = within(small, "measure-pack", "kernels.pack", "--out", "table.json", "--json")
    assert measured.returncode == 0, measured.stderr
    assert json.loads(measured.stdout)["wrong"] == 0
    return small


@pytest.fixture(scope="module")
def searched(away: Path) -> dict:
    """The document of a search against that table."""
    result = within(away, *SMALL[:6], "--study", "away", "--cost-table", "table.json", "--budget", "4", "--jobs", "1", "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_latency_is_the_sum_of_kernel_times_and_says_so(away: Path, searched: dict) -> None:
    table = read_cost_file(away / "table.json")
    assert searched["target"] == TARGET
    assert table.device in searched["device"] and table.digest[:16] in searched["device"]
    assert searched["figures"]["latency_ms"].startswith("modelled") and searched["figures"]["peak_bytes"] == "counted"
    assert {searched["baseline"]["latency_source"], *(point["latency_source"] for point in searched["front"])} == {"modelled"}
    times = sorted(table.seconds(symbol) for symbol in table.kernels)
    for trial in trials(away, "away"):
        latency = trial.user_attrs["measurement"]["latency"]
        assert latency["source"] == "modelled" and latency["ratio"] is None and not latency["noisy"]
        # Three layers, and conversions between them.
        assert 3 * times[0] < latency["median_ms"] / 1e3 - table.inference_s < 12 * times[-1]
    text = within(away, "front", "--study", "away").stdout
    assert "latency modelled for" in text and "loss measured on this machine" in " ".join(text.split())


def test_again_and_the_numbers_are_the_same(away: Path, searched: dict) -> None:
    for point in searched["front"]:
        assert point["heldout"]["latency_ms"] == point["latency_ms"]
        assert point["heldout"]["images"] > 0


def test_a_study_keeps_its_table(away: Path, searched: dict) -> None:
    other = json.loads((away / "table.json").read_text())
    (away / "other.json").write_text(json.dumps(other | {"device": "something else"}))
    study = (*SMALL[:6], "--study", "away", "--budget", "4")
    fails(away, 1, ("made by another search", "device was"), *study, "--cost-table", "other.json")
    fails(away, 1, ("made by another search", "is 'nothing'"), *study, "--target", TARGET)


def test_evaluate_and_tables_take_it_too(away: Path) -> None:
    result = within(away, "evaluate", *MODEL, "--cost-table", "table.json", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["target"] == open_target(TARGET).description and "cost table" in document["device"]
    assert {row["latency_source"] for row in document["rows"]} == {"modelled"}
    result = within(away, "tables", *MODEL, "--cost-table", "table.json", "--json")
    assert result.returncode == 0, result.stderr
    assert {row["precision"] for row in json.loads(result.stdout)["layers"]} == {"int8"}


def test_an_export_is_compiled_for_the_device_and_says_that_it_never_ran(away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of float layers the last bits may be the other CPU's; int8 everywhere is among the starting points that random is given.
    study = (*SMALL[:6], "--study", "integers", "--sampler", "random", "--cost-table", "table.json", "--budget", "4")
    result = within(away, *study, "--jobs", "1", "--json")
    assert result.returncode == 0, result.stderr
    complete = [one for one in trials(away, "integers") if one.values]
    number = next(one.number for one in complete if set(one.user_attrs["config"]["precision"].values()) == {"int8"})
    result = within(away, "export", "--study", "integers", "--trial", str(number), "--out", "away-bundle", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["bundles"][0]["remeasured"] is False
    manifest = json.loads((away / "away-bundle" / "manifest.json").read_text())
    assert manifest["target"]["description"] == open_target(TARGET).description
    assert "never run" in manifest["metrics"]["remark"]
    verified = within(away, "verify", "away-bundle", "--json")
    assert verified.returncode == 0, verified.stderr
    # Whether a float layer's bits differ is a matter of the two processors.
    monkeypatch.setattr(verify, "_run_fresh", lambda directory, trust: {"mismatching_bits": 3, "outputs": 32})
    fails(away, 1, ("3 of 1024", "another CPU", "float layers may differ"), "verify", "away-bundle")


def test_kernels_without_a_time_are_named_with_the_way_out(away: Path) -> None:
    document = json.loads((away / "table.json").read_text())
    document["kernels"] = {symbol: one for symbol, one in document["kernels"].items() if "conv2d fp32" not in one["what"]}
    (away / "less.json").write_text(json.dumps(document))
    fails(away, 2, ("has no time of", "conv2d fp32 of first", "qsearch pack"), "evaluate", *MODEL, "--cost-table", "less.json")


def test_a_kernel_that_is_wrong_there_fails_the_trials_that_need_it(away: Path) -> None:
    document = json.loads((away / "table.json").read_text())
    for one in document["kernels"].values():
        if "conv2d int8" in one["what"]:
            one.update(exact=False, problem="made up")
    (away / "wrong.json").write_text(json.dumps(document))
    fails(away, 1, ("are wrong on",), "evaluate", *MODEL, "--precision", "int8", "--cost-table", "wrong.json")
    search = (*SMALL[:6], "--study", "wrong", "--cost-table", "wrong.json", "--sampler", "random", "--jobs", "1")
    result = within(away, *search, "--budget", "1", "--json")
    assert result.returncode == 0, result.stderr
    failed = [trial for trial in trials(away, "wrong") if "error" in trial.user_attrs]
    assert all("are wrong on" in trial.user_attrs["error"] for trial in failed)


BAD = {
    "no table": (2, ("--cost-table", "nowhere.json"), ("nowhere.json cannot be read", "measure-pack")),
    "no table at all": (2, ("--cost-table", "data/a/00.png"), ("is no cost table",)),
    "another target": (2, ("--cost-table", "table.json", "--target", "haswell"), ("is of target 'portable'",)),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_used_is_refused(away: Path, what: str) -> None:
    code, options, words = BAD[what]
    fails(away, code, words, "evaluate", *MODEL, *options)


def test_tuning_is_for_this_machine(away: Path) -> None:
    fails(away, 2, ("--tune",), *SMALL[:6], "--study", "tuned", "--cost-table", "table.json", "--tune", "1")


def test_a_pack_needs_a_place(small: Path) -> None:
    fails(small, 2, ("--out: expected a file",), "pack", *MODEL, "--out", "nowhere/kernels.pack")
    fails(small, 1, ("cannot be read as a pack",), "measure-pack", "nowhere.pack")
