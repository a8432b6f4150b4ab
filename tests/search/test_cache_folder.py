"""The cache folder: what belongs together, damage, eviction, who may remove what."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from networks import images, network, ranges_of
from typer.testing import CliRunner

from qsearch.build.cache import KernelCache
from qsearch.build.link import Linker
from qsearch.build.target import open_target
from qsearch.commands.app import app
from qsearch.config import QuantConfig
from qsearch.data import image_file
from qsearch.errors import StudyError, UsageError
from qsearch.quantize.lower import lower
from qsearch.quantize.reference import run_program
from qsearch.quantize.weight_store import WeightStore
from qsearch.search.evaluation.cache_entries import cache_entries, evict, is_entry_whole
from qsearch.search.evaluation.cache_folder import CacheFolder, cache_to_itself, most_bytes

MODEL, _ = network("bottlenecks")
PROGRAM = lower(MODEL, QuantConfig(), ranges_of(MODEL, QuantConfig()), WeightStore())


def linker(folder: Path) -> Linker:
    return Linker(KernelCache(folder / "kernels", open_target("host")))


def check_outputs(folder: Path) -> None:
    machine, x = linker(folder).build(PROGRAM).open(), images(1)
    np.testing.assert_array_equal(machine["main"](machine.tensor(x)).numpy(), run_program(PROGRAM, x)[PROGRAM.output.name])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    linker(folder).build(PROGRAM)
    (folder / "images").mkdir()
    image_file.write_images(folder / "images" / "images-a.npy", (2, 1, 2, 2), np.zeros((2, 1, 2, 2), np.float32))
    (folder / "statistics").mkdir()
    np.savez(folder / "statistics" / "b.npz", x=np.arange(5))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "cache"))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", [".so", ".o", ".lib", ".sha256"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "gone"])
def test_damaged_kernels_are_compiled_again(folder: Path, suffix: str, damage: str) -> None:
    victims = sorted(path for path in (folder / "kernels").iterdir() if path.suffix == suffix)
    for number, victim in enumerate(victims):
        if damage == "flipped":
            flip(victim, 3 + 977 * number)
        elif damage == "gone":
            victim.unlink()
        else:
            victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2] if damage == "truncated" else b"")
    before = {path.name for path in (folder / "kernels").iterdir()}
    check_outputs(folder)
    assert all(is_entry_whole(one) for one in cache_entries(folder) if one.main.suffix == ".so")
    assert before <= {path.name for path in (folder / "kernels").iterdir()}


def test_entries_hold_every_file_once(folder: Path) -> None:
    entries = cache_entries(folder)
    files = [file for entry in entries for file in entry.files]
    assert len(files) == len(set(files))
    # Who is at which kernel is no entry.
    assert {*files, folder / "kernels" / ".claims"} == {path for path in folder.rglob("*") if path.is_file()}
    assert {entry.kind for entry in entries} == {"kernels", "images", "statistics"}
    assert sum(entry.bytes for entry in entries) == sum(path.stat().st_size for path in files)
    assert all(is_entry_whole(entry) for entry in entries)


def test_what_was_used_longest_ago_goes_first_and_is_made_again(folder: Path) -> None:
    for number, name in enumerate(("kernels", "images", "statistics")):
        for path in (folder / name).iterdir():
            os.utime(path, (1e9 + number, 1e9 + number))
    entries = cache_entries(folder)
    assert [entry.kind for entry in entries] == ["kernels", "images", "statistics"]
    assert evict(entries, sum(entry.bytes for entry in entries)) == []
    assert [entry.kind for entry in evict(entries, sum(entry.bytes for entry in entries[1:]))] == ["kernels"]
    assert [entry.kind for entry in cache_entries(folder)] == ["images", "statistics"]
    check_outputs(folder)


def test_what_somebody_uses_is_neither_locked_nor_evicted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSEARCH_CACHE_BYTES", "0")
    with cache_to_itself(folder), pytest.raises(StudyError, match="in use by another process"), cache_to_itself(folder):
        pass
    other = os.open(folder / ".lock", os.O_RDWR)
    try:
        fcntl.flock(other, fcntl.LOCK_SH)
        CacheFolder(folder)
        assert cache_entries(folder)
    finally:
        os.close(other)


def test_a_cache_that_nobody_has_open_any_more_is_free(folder: Path) -> None:
    used = CacheFolder(folder)
    with pytest.raises(StudyError, match="in use by another process"), cache_to_itself(folder):
        pass
    del used
    gc.collect()
    with cache_to_itself(folder):
        assert cache_entries(folder)


def test_a_cache_beyond_its_bound_shrinks_when_it_is_opened_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSEARCH_CACHE_BYTES", "2 GB")
    with pytest.raises(UsageError, match="a whole number of bytes, got '2 GB'"):
        most_bytes()
    monkeypatch.setenv("QSEARCH_CACHE_BYTES", "0")
    CacheFolder(folder)
    assert cache_entries(folder) == []


def test_the_command_shows_checks_and_prunes(folder: Path) -> None:
    def told(*options: str) -> dict[str, object]:
        result = CliRunner().invoke(app, ["cache", "--folder", str(folder), "--json", *options])
        assert result.exit_code == 0, result.output
        return dict(json.loads(result.stdout))

    shown = told()
    assert shown["kinds"]["images"]["entries"] == 1 and shown["damaged"] == shown["dropped"] == []  # type: ignore[index]
    flip(folder / "images" / "images-a.npy", -1)
    flip(folder / "statistics" / "b.npz", 60)
    assert sorted(Path(name).name for name in told("--check")["damaged"]) == ["b.npz", "images-a.npy"]  # type: ignore[attr-defined]
    assert told("--check")["damaged"] == []
    assert told("--prune", "--max-bytes", "0")["bytes"] == 0
    text = CliRunner().invoke(app, ["cache", "--folder", str(folder), "--check"])
    assert "0 damaged entries" in text.stderr and "kernels" in text.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [(("--max-bytes", "5"), "--max-bytes is what --prune leaves"), (("--folder", "nowhere"), "there is no cache nowhere")],
)
def test_bad_input(folder: Path, options: tuple[str, ...], words: str) -> None:
    result = CliRunner().invoke(app, ["cache", "--folder", str(folder), *options])
    assert result.exit_code == 2 or result.exit_code == 1
    assert words in " ".join(result.stderr.split())
