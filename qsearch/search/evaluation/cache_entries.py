"""What a cache folder holds: which files belong together, what they take, when they were used, whether they are whole."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qsearch.build.digests import is_as_named, is_whole, objects_are_whole, recorded_digests
from qsearch.data.image_file import images_are_whole

__all__ = ["KINDS", "TRAVELLED", "CacheEntry", "cache_entries", "evict", "is_entry_whole"]

# Folders of NumPy archives, which have checksums of their own.
_ARCHIVES = ("statistics", "sensitivity", "roundings")
# Kernel libraries that came with modules from other machines.
TRAVELLED = "travelled"
KINDS = ("kernels", "images", *_ARCHIVES, TRAVELLED)


@dataclass(frozen=True)
class CacheEntry:
    """What is kept or dropped as a whole.

    Attributes:
        kind: One of KINDS.
        main: The file that it is named after: a library of kernels that were compiled together, images, or an archive.
        files: All its files.
        bytes: Their sizes.
        used: When it was last read or written, seconds since 1970; within a day where the file system notes it so.
    """

    kind: str
    main: Path
    files: tuple[Path, ...]
    bytes: int
    used: float


def cache_entries(folder: Path) -> list[CacheEntry]:
    """All entries of a cache folder, the one that was used longest ago first; what vanishes meanwhile is left out."""
    found = [*_kernels(folder / "kernels"), *_images(folder / "images")]
    found += [("kernels", path, [path]) for path in _unowned(folder / "kernels", found)]
    found += [(TRAVELLED, path, [path]) for path in (folder / TRAVELLED).glob("*.so")]
    found += [(kind, path, [path]) for kind in _ARCHIVES for path in (folder / kind).glob("*.npz")]
    entries = (_entry(kind, main, files) for kind, main, files in found)
    return sorted((entry for entry in entries if entry is not None), key=lambda entry: entry.used)


def is_entry_whole(entry: CacheEntry) -> bool:
    """Whether an entry is as it was written."""
    if entry.kind == "images":
        return images_are_whole(entry.main)
    if entry.kind == TRAVELLED:
        return is_as_named(entry.main)
    if entry.kind != "kernels":
        return _archive_is_whole(entry.main)
    folder = entry.main.parent
    symbols = {file.stem for file in entry.files if file.suffix == ".o"}
    pointed = (recorded_digests(file) for file in entry.files if file.suffix == ".lib")
    libraries = all(is_whole(folder / name, digest) for names in pointed for name, digest in names.items())
    return libraries and all(objects_are_whole(folder, symbol) for symbol in symbols)


def evict(entries: Iterable[CacheEntry], most_bytes: int) -> list[CacheEntry]:
    """Drop the entries that were used longest ago until the rest takes no more than so many bytes.

    Args:
        entries: As `cache_entries` gives them; nobody else uses the folder.
        most_bytes: What may stay.

    Returns:
        Those dropped.
    """
    entries = list(entries)
    excess, dropped = sum(entry.bytes for entry in entries) - most_bytes, []
    for entry in entries:
        if excess <= 0:
            break
        # What points to a file goes before it.
        for file in sorted(entry.files, key=lambda file: (file == entry.main, file.suffix != ".lib")):
            file.unlink(missing_ok=True)
        excess -= entry.bytes
        dropped.append(entry)
    return dropped


def _kernels(folder: Path) -> Iterator[tuple[str, Path, list[Path]]]:
    """Libraries, each with the kernels that point to it."""
    owned: dict[Path, list[Path]] = {path: [path] for path in folder.glob("lib_*.so")}
    for pointer in folder.glob("*.lib"):
        for name in recorded_digests(pointer):
            if folder / name in owned:
                owned[folder / name] += [pointer, *_of_symbol(folder, pointer.stem)]
    for library, files in owned.items():
        yield "kernels", library, files


def _of_symbol(folder: Path, symbol: str) -> list[Path]:
    kinds = ("o", "cubin", "sha256", "time.json", "uniform_time.json")
    return [path for kind in kinds if (path := folder / f"{symbol}.{kind}").exists()]


def _unowned(folder: Path, found: Iterable[tuple[str, Path, list[Path]]]) -> list[Path]:
    """Kernel files that belong to no library: objects for other machines, and what a damaged pointer has left."""
    owned = {file for _, _, files in found for file in files}
    return [path for pattern in ("*.o", "*.cubin", "*.lib", "*.sha256") for path in folder.glob(pattern) if path not in owned]


def _images(folder: Path) -> Iterator[tuple[str, Path, list[Path]]]:
    for path in folder.glob("*.npy"):
        beside = path.with_suffix(".crc32")
        yield "images", path, [path, *([beside] if beside.exists() else [])]


def _entry(kind: str, main: Path, files: Iterable[Path]) -> CacheEntry | None:
    try:
        found = {file: file.stat() for file in files}
    except FileNotFoundError:
        return None
    # Of the main file, which is read by users alone; to list the entries takes reading others.
    used = max(found[main].st_atime, found[main].st_mtime)
    return CacheEntry(kind, main, tuple(found), sum(one.st_size for one in found.values()), used)


def _archive_is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, ValueError, EOFError):
        return False
