"""Files of strangers are read within bounds."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest

from qsearch.bounded import MOST_DEPTH, check_archive, parse_json, read_file, read_json, shortened


def test_size_and_kind(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10))
    assert read_file(tmp_path / "file", 10) == bytes(10)
    with pytest.raises(ValueError, match="10 bytes, at most 9"):
        read_file(tmp_path / "file", 9)
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(ValueError, match="no regular file"):
            read_json(tmp_path / name)
    with pytest.raises(OSError, match="No such file"):
        read_json(tmp_path / "none")


@pytest.mark.parametrize("depth", [MOST_DEPTH, MOST_DEPTH + 1, 100_000])
@pytest.mark.parametrize("kind", ["[]", "{}"])
def test_depth(kind: str, depth: int) -> None:
    text = "[" * depth + "]" * depth if kind == "[]" else '{"a":' * (depth - 1) + "{}" + "}" * (depth - 1)
    if depth <= MOST_DEPTH:
        assert parse_json(text) == json.loads(text)
        return
    with pytest.raises(ValueError, match=f"more than {MOST_DEPTH} deep"):
        parse_json(text)


def test_what_is_no_json() -> None:
    for junk in (b"\xff\xfe", b"{", b"", b"9" * 5000):
        with pytest.raises(ValueError):
            parse_json(junk)


def test_what_an_archive_unpacks_to(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(1 << 20))
        check_archive(archive, 1 << 20)
        with pytest.raises(ValueError, match="unpacks to 1,048,576 bytes, at most 1,000"):
            check_archive(archive, 1000)


def test_values_in_messages_are_short() -> None:
    assert shortened("a") == "'a'"
    assert len(shortened("a" * 10**6)) < 300
    assert shortened([10**5000]) == "list"
