"""Modules on their way between machines."""

from __future__ import annotations

import pickle
from pathlib import Path

from qsearch.build.packed import PackedModule
from qsearch.build.travelling import TravellingModule
from qsearch.search.evaluation.cache_entries import TRAVELLED, cache_entries, is_entry_whole


def packed(folder: Path, kernel: bytes) -> PackedModule:
    """A module of one kernel, whose files hold what nobody loads."""
    folder.mkdir()
    (folder / "a.module").write_bytes(b"executable")
    (folder / "batch.so").write_bytes(kernel)
    return PackedModule(folder / "a.module", (folder / "batch.so",), False, "cpu")


def test_a_module_arrives_as_it_left(tmp_path: Path) -> None:
    sent = packed(tmp_path / "here", b"kernel")
    travelling = pickle.loads(pickle.dumps(TravellingModule.of(sent)))
    # Its file went along; the kernel stays in the cache that it is from.
    assert not sent.file.exists() and sent.libraries[0].exists()
    there = travelling.unpack(tmp_path / "there")
    assert there.file.read_bytes() == b"executable" and there.device == "cpu"
    assert [one.read_bytes() for one in there.libraries] == [b"kernel"]
    # A library that was loaded is not written again under the one who uses it.
    before = there.libraries[0].stat().st_ino
    assert travelling.unpack(tmp_path / "there").libraries[0].stat().st_ino == before
    # One that a power cut has left half of is.
    there.libraries[0].write_bytes(b"ker")
    assert travelling.unpack(tmp_path / "there").libraries[0].read_bytes() == b"kernel"


def test_kernels_that_travelled_count_for_the_cache(tmp_path: Path) -> None:
    module = TravellingModule.of(packed(tmp_path / "here", b"kernel")).unpack(tmp_path / TRAVELLED)
    (entry,) = cache_entries(tmp_path)
    assert (entry.kind, entry.files, entry.bytes) == (TRAVELLED, module.libraries, 6) and is_entry_whole(entry)
    module.libraries[0].write_bytes(b"ker")
    assert not is_entry_whole(entry)


def test_kernels_of_the_same_name_do_not_take_each_others_place(tmp_path: Path) -> None:
    """Two machines may have compiled different kernels into files of one name."""
    found = [
        TravellingModule.of(packed(tmp_path / str(number), kernel)).unpack(tmp_path / "there").libraries[0]
        for number, kernel in enumerate((b"one", b"two"))
    ]
    assert [path.read_bytes() for path in found] == [b"one", b"two"]
