"""What a data source holds: the path, label and wanted part of every image, before any is decoded."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from qsearch.bounded import check_file
from qsearch.data.boxes import ImageBoxes
from qsearch.data.decode import open_image
from qsearch.data.labels import Classes, Labels, map_labels
from qsearch.errors import DataError

__all__ = ["MOST_TABLE_BYTES", "SPLITS", "Listing", "check_splits", "list_csv", "list_folders", "listing_of", "resolve_image"]

SPLITS = ("calibration", "search", "heldout")
# Some four million images.
MOST_TABLE_BYTES = 1 << 28
_SHOWN = 200
_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Listing:
    """All images of a source, in the order of their names.

    Attributes:
        name: Short name of the source.
        names: One stable name per image, with forward slashes, relative to the source.
        labels: Classes and parts.
        versions: Size in bytes and time of change in nanoseconds per image.
        open: Decodes image number i; raises DataError.
        boxes: What is on each image, for a detector; None where images have a class each.
    """

    name: str
    names: tuple[str, ...]
    labels: Labels
    versions: tuple[tuple[int, int], ...]
    open: Callable[[int], Image.Image]
    boxes: tuple[ImageBoxes, ...] | None = None


def list_folders(folder: Path, classes: Classes) -> Listing:
    """List a directory with one folder per class.

    Args:
        folder: the directory.
        classes: of the model; see `map_labels` for how folder names become indices.

    Returns:
        The images, by folder and file name.

    Raises:
        DataError: the directory has fewer than two classes, an empty class, or a folder that is no class.
    """
    found = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise DataError(f"{folder} holds neither labels.csv nor class folders; expected one folder of images per class")
    files: list[tuple[Path, str]] = []
    for directory in found:
        images = sorted(path for path in directory.iterdir() if path.suffix.lower() in _SUFFIXES and path.is_file())
        if not images:
            raise DataError(f"{directory} holds no images; expected one folder of images per class, remove empty ones")
        files += [(path, directory.name) for path in images]
    labels, names = map_labels([label for _, label in files], classes, [str(path.parent) for path, _ in files])
    relative = tuple(f"{path.parent.name}/{path.name}" for path, _ in files)
    return listing_of(folder.resolve().name, [path for path, _ in files], relative, Labels(labels, names, None))


def list_csv(table: Path, classes: Classes) -> Listing:
    """List the images that a `labels.csv` names.

    Args:
        table: CSV file with the columns path, label and, optionally, split; others are ignored. Paths are relative to
            the file's folder, or to that folder's parent.
        classes: of the model.

    Returns:
        The images, by name.

    Raises:
        DataError: a column is missing, a value is not allowed, or an image is missing or named twice.
    """
    rows = sorted(_read_rows(table), key=lambda row: row["path"])
    places = [f"{table} line {row['line']}" for row in rows]
    paths = [resolve_image(table, row["path"], place) for row, place in zip(rows, places, strict=True)]
    _reject_duplicates(paths, rows, places)
    splits = tuple(row["split"] for row in rows) if rows and "split" in rows[0] else None
    check_splits(splits or (), places)
    labels, names = map_labels([row["label"] for row in rows], classes, places)
    return listing_of(table.parent.resolve().name, paths, tuple(row["path"] for row in rows), Labels(labels, names, splits))


def check_splits(splits: Sequence[str], places: Sequence[str]) -> None:
    """Refuse parts that there are none of.

    Args:
        splits: As written; none for a source without them.
        places: Where each was read, for messages.

    Raises:
        DataError: A part is unknown.
    """
    for split, place in zip(splits, places, strict=False):
        if split not in SPLITS:
            raise DataError(f"{place}: split must be one of {', '.join(SPLITS)}; got {split!r}")


def _read_rows(table: Path) -> list[dict[str, str]]:
    """Read the used columns, with the line number of each row."""
    try:
        check_file(table, MOST_TABLE_BYTES)
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            columns = [column.strip() for column in reader.fieldnames or ()]
            _check_columns(table, columns)
            reader.fieldnames = columns
            used = [column for column in ("path", "label", "split") if column in columns]
            rows = [{name: (row[name] or "").strip() for name in used} | {"line": str(reader.line_num)} for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read {table} as a CSV file in UTF-8 ({error})") from error
    incomplete = next((row for row in rows if not row["path"] or not row["label"]), None)
    if incomplete:
        raise DataError(f"{table} line {incomplete['line']}: the path or the label is empty; fill it in or remove the row")
    if not rows:
        raise DataError(f"{table} lists no images; expected one row per image with the columns path and label")
    return rows


def _check_columns(table: Path, columns: list[str]) -> None:
    """Require path and label; other columns may be there, unless one is a misspelt or repeated `split`."""
    missing = [column for column in ("path", "label") if column not in columns]
    if missing:
        raise DataError(f"{table} lacks the column {missing[0]!r}; it has {', '.join(columns) or 'none'}")
    repeated = [column for column in ("path", "label", "split") if columns.count(column) > 1]
    if repeated:
        raise DataError(f"{table} has the column {repeated[0]!r} twice; keep one")
    lookalikes = difflib.get_close_matches("split", [column.lower() for column in columns], cutoff=0.75)
    if "split" not in columns and lookalikes:
        raise DataError(f"{table} has the unknown column {lookalikes[0]!r}; name it 'split', or rename it if it is not one")


def resolve_image(table: Path, name: str, place: str) -> Path:
    """The file that a table names: relative to the table's folder, or to that folder's parent.

    Raises:
        DataError: There is none, or it lies elsewhere; links in these folders may lead anywhere, they are the user's own.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{place}: {name[:_SHOWN]} leads out of {table.parent}; name images by their path within it")
    try:
        for folder in (table.parent, table.parent.parent):
            if (folder / name).is_file():
                return folder / name
    except OSError as error:
        raise DataError(f"{place}: {name[:_SHOWN]}: {error.strerror}; correct the path or remove the row") from error
    shown = name[:_SHOWN]
    raise DataError(f"{place}: {shown} exists neither in {table.parent} nor in its parent; correct the path or remove the row")


def _reject_duplicates(paths: Sequence[Path], rows: Sequence[dict[str, str]], places: Sequence[str]) -> None:
    """An image in two parts would leak from calibration or search into the verdict."""
    seen: dict[Path, int] = {}
    for index, path in enumerate(paths):
        first = seen.setdefault(path.resolve(), index)
        if first != index:
            parts = sorted({rows[first].get("split", ""), rows[index].get("split", "")})
            where = f", in the splits {' and '.join(parts)}" if len(parts) > 1 else ""
            raise DataError(f"{places[index]}: {path} is already named on line {rows[first]['line']}{where}; keep one row")


def listing_of(name: str, paths: Sequence[Path], names: tuple[str, ...], labels: Labels) -> Listing:
    """Add to names and labels what the file system knows."""
    states = [path.stat() for path in paths]
    versions = tuple((state.st_size, state.st_mtime_ns) for state in states)
    return Listing(name, names, labels, versions, open=lambda index: open_image(paths[index]))
