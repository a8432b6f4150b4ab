"""`tune` and `search --tune`: tiles are timed once, remembered with the kernels and found by whoever comes next."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from image_folders import write_classes
from real_search import SMALL, completed, within

MODEL = SMALL[1:5]
# More than the kernels of the smallest network take; the time limit itself is tested apart.
ENOUGH = "120"


def tiles(folder: Path) -> dict[str, dict[str, int]]:
    """What is remembered in the kernel cache, by file."""
    files = (folder / "studies" / "cache" / "kernels").glob("tile_*.json")
    return {file.name: json.loads(file.read_text(encoding="utf-8")) for file in files}


def tune(folder: Path, precision: str, *options: str) -> CompletedProcess[str]:
    """Tune the smallest network."""
    result = within(folder, "tune", *MODEL, "--precision", precision, "--seconds", ENOUGH, *options)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the smallest network's images lie."""
    root = tmp_path_factory.mktemp("tuned")
    write_classes(root / "data")
    return root


@pytest.fixture(scope="module")
def first(folder: Path) -> CompletedProcess[str]:
    """The first tuning of its int8 kernels."""
    return tune(folder, "int8", "--json")


def test_choices_are_remembered_in_the_kernel_cache(folder: Path, first: CompletedProcess[str]) -> None:
    document = json.loads(first.stdout)
    assert document["model"] == "broken_networks:Net"
    kernels = {kernel["op"]: kernel for kernel in document["kernels"]}
    assert {"first", "second"} <= set(kernels)
    for kernel in kernels.values():
        assert kernel["precision"] == "int8"
        assert kernel["gain"] >= 1.0
        assert kernel["chosen"] == kernel["predicted"] or kernel["gain"] > 1.0
    remembered = list(tiles(folder).values())
    assert len(remembered) >= len(kernels)
    assert all(kernel["chosen"] in remembered for kernel in kernels.values())


def test_progress_is_shown(first: CompletedProcess[str]) -> None:
    count = len(json.loads(first.stdout)["kernels"])
    (bar,) = [line for line in first.stderr.splitlines() if line.startswith("tuning kernels")]
    assert f"{count}/{count}" in bar


def test_a_second_run_finds_them(folder: Path, first: CompletedProcess[str]) -> None:
    before = tiles(folder)
    again = tune(folder, "int8")
    assert "0 kernels of broken_networks:Net" in again.stdout
    assert tiles(folder) == before


def test_no_kernel_is_begun_after_the_time_given(folder: Path, first: CompletedProcess[str]) -> None:
    before = tiles(folder)
    result = within(folder, "tune", *MODEL, "--precision", "int16", "--seconds", "0", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["kernels"] == []
    assert tiles(folder) == before


@pytest.mark.slow
def test_a_search_tunes_first_and_leaves_its_tiles_to_others(folder: Path, first: CompletedProcess[str]) -> None:
    before = tiles(folder)
    result = within(folder, *SMALL, "--budget", "1", "--tune", "1", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["trials"]["complete"] == len(completed(folder, "small")) == 1
    assert "tuning kernels" in result.stderr
    after = tiles(folder)
    # The kernels that the space adds to those of int8: of float, and at least one within a second.
    assert len(after) > len(before)
    assert before.items() <= after.items()
    rest = json.loads(tune(folder, "fp32,int8", "--json").stdout)["kernels"]
    assert {kernel["precision"] for kernel in rest} <= {"fp32"}
    assert len(tiles(folder)) == len(after) + len(rest)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("tune", "--precision", "int7"), ("unknown precision 'int7'", "w4a8")),
        (("tune", "--precision", "int8,nowhere.json"), ("cannot read configuration nowhere.json",)),
        (("tune", "--precision", ","), ("--precision names nothing",)),
        (("tune", "--seconds", "-1"), ("--seconds",)),
        (("tune", "--seconds", "soon"), ("--seconds",)),
        (("tune", "--target", "pentium9"), ("'pentium9'", "portable")),
        (("tune", "--model", "demoo"), ("'demo'",)),
        (("tune", "--nix"), ("--nix",)),
        (("search", "--tune", "-1"), ("--tune",)),
        (("search", "--tune", "1", "--model", "demoo"), ("'demo'",)),
    ],
)
def test_a_wrong_argument_is_an_error_without_a_traceback(
    tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    result = within(tmp_path, *arguments)
    assert result.returncode == 2
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []
