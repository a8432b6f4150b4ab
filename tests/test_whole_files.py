"""Files that are whole or not there: whatever an error, a kill or a power cut leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from power_cut import watched

from qsearch.whole_files import make_folder, put_in_place, remove_strays, scratch_name, write_whole


def put(path: Path, content: bytes, durable: bool = True) -> None:
    with write_whole(path, durable) as stream:
        stream.write(content)


def test_a_durable_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"first one")
    with watched(tmp_path) as journal:
        put(tmp_path / "file", b"second one")
        put(tmp_path / "file", b"third one")
    found = {tree.get("file") for _, tree in journal.states()}
    assert found == {b"first one", b"second one", b"third one"}
    assert {tree.get("file") for tree in journal.last} == {b"third one"}
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("durable", [True, False])
def test_only_who_waits_for_the_disk_is_safe(tmp_path: Path, durable: bool) -> None:
    with watched(tmp_path) as journal:
        put(tmp_path / "file", b"content", durable)
    found = {tree.get("file") for tree in journal.last}
    assert found == ({b"content"} if durable else {None, b"", b"content", bytes(7), b"con"})


def test_a_folder_is_there_with_all_its_files_or_not_at_all(tmp_path: Path) -> None:
    with watched(tmp_path) as journal:
        make_folder(tmp_path / "a" / "b")
        scratch = scratch_name(tmp_path / "a" / "b" / "made")
        (scratch / "inner").mkdir(parents=True)
        for name in ("one", "two", "inner/three"):
            (scratch / name).write_text(name)
        put_in_place(scratch, tmp_path / "a" / "b" / "made")
    names = {f"a/b/made/{name}" for name in ("one", "two", "inner", "inner/three")}
    whole = {f"a/b/made/{name}": name.encode() for name in ("one", "two", "inner/three")} | {"a/b/made/inner": None}
    for _, tree in journal.states():
        if "a/b/made" in tree:
            assert {name: tree[name] for name in names} == whole
    assert all("a/b/made" in tree for tree in journal.last)


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    put(tmp_path / "file", b"old")
    with pytest.raises(KeyboardInterrupt), write_whole(tmp_path / "file") as stream:
        stream.write(b"half of the ne")
        raise KeyboardInterrupt
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_strays_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    own, dead, other = scratch_name(tmp_path / "x.json"), tmp_path / ".x.json.999999999-0", tmp_path / ".y.json.999999999-0"
    folder = tmp_path / ".x.json.999999998-0"
    for path in (own, dead, other):
        path.write_text("half")
    folder.mkdir()
    (folder / "file").write_text("half")
    remove_strays(tmp_path / "x.json")
    assert set(tmp_path.iterdir()) == {own, other}
