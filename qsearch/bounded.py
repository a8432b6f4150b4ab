"""Read files that a stranger may have written: regular ones, bounded in size, in depth and in what they unpack to."""

from __future__ import annotations

import json
import stat
import zipfile
from pathlib import Path
from typing import Any

__all__ = ["MOST_DEPTH", "MOST_JSON_BYTES", "check_archive", "check_file", "parse_json", "read_file", "read_json", "shortened"]

MOST_JSON_BYTES = 1 << 24
# Of lists and objects within each other; nothing that is read here has ten.
MOST_DEPTH = 64
MOST_MEMBERS = 100_000
_SHOWN = 200


def check_file(path: Path, most_bytes: int) -> None:
    """Refuse what is no regular file, where reading could wait for ever, and one that is too large.

    Raises:
        OSError: There is none.
        ValueError: It is refused.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise ValueError("it is no regular file")
    if state.st_size > most_bytes:
        raise ValueError(f"it has {state.st_size:,} bytes, at most {most_bytes:,} are read")


def read_file(path: Path, most_bytes: int = MOST_JSON_BYTES) -> bytes:
    """Read a file, at most so much of it.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no regular file, or is too large.
    """
    check_file(path, most_bytes)
    return path.read_bytes()


def parse_json(text: str | bytes) -> Any:
    """Parse JSON in UTF-8 that is not nested too deeply.

    Raises:
        ValueError: It is none, or is.
    """
    try:
        found = json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep") from None
    level = [found]
    for _ in range(MOST_DEPTH):
        level = [one for value in level for one in _inner(value)]
        if not level:
            return found
    raise ValueError(f"it is nested more than {MOST_DEPTH} deep")


def _inner(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def read_json(path: Path, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """Read a JSON file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is none, is too large or too deep.
    """
    return parse_json(read_file(path, most_bytes))


def check_archive(archive: zipfile.ZipFile, most_bytes: int) -> None:
    """Refuse a zip archive that unpacks to more than so much; its reader unpacks no more than is declared.

    Raises:
        ValueError: It does, or has too many members.
    """
    members = archive.infolist()
    if len(members) > MOST_MEMBERS:
        raise ValueError(f"it has {len(members):,} members, at most {MOST_MEMBERS:,} are read")
    declared = sum(member.file_size for member in members)
    if declared > most_bytes:
        raise ValueError(f"it unpacks to {declared:,} bytes, at most {most_bytes:,} are read")


def shortened(value: Any) -> str:
    """A value for a message, in a line of moderate length."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or what holds one
        text = type(value).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
