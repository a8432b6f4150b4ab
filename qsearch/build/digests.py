"""SHA-256 digests beside the files of the kernel cache, in the form that `sha256sum --check` reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

__all__ = ["is_as_named", "is_whole", "objects_are_whole", "record_digests", "recorded_digests", "short_digest"]


def record_digests(path: Path, files: Iterable[Path]) -> None:
    """Write the digests of files that lie beside one another."""
    path.write_text("".join(f"{_sha256(file)}  {file.name}\n" for file in files), encoding="ascii")


def recorded_digests(path: Path) -> dict[str, str]:
    """File name -> digest; empty where there is no record, or one that cannot be read."""
    try:
        lines = [line.split("  ") for line in path.read_text(encoding="ascii").splitlines()]
    except (OSError, UnicodeDecodeError):
        return {}
    return {name: digest for digest, name in lines} if all(len(line) == 2 for line in lines) else {}


def is_whole(path: Path, digest: str) -> bool:
    """Whether a file is there and has a digest."""
    try:
        return _sha256(path) == digest
    except OSError:
        return False


def objects_are_whole(directory: Path, symbol: str) -> bool:
    """Whether a kernel's object file is there, and machine code for a GPU where it has some, as they were written."""
    recorded = recorded_digests(directory / f"{symbol}.sha256")
    return f"{symbol}.o" in recorded and all(is_whole(directory / name, digest) for name, digest in recorded.items())


def short_digest(content: bytes) -> str:
    """What is put at the end of the name of a file that holds this, after a hyphen."""
    return hashlib.sha256(content).hexdigest()[:24]


def is_as_named(path: Path) -> bool:
    """Whether a file is there and holds what the digest in its name says."""
    try:
        return path.stem.rpartition("-")[2] == short_digest(path.read_bytes())
    except OSError:
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
