"""The images of a detector: a table of boxes that the user wrote, or the scenes of the built-in detector."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from qsearch.bounded import check_file
from qsearch.data.boxes import ImageBoxes
from qsearch.data.dataset import Dataset
from qsearch.data.decode import image_size
from qsearch.data.labels import Classes, Labels, map_labels
from qsearch.data.listing import MOST_TABLE_BYTES, Listing, check_splits, listing_of, resolve_image
from qsearch.data.preprocessing import Preprocessing
from qsearch.data.split import divide
from qsearch.errors import DataError

__all__ = ["BOXES_FILE", "list_boxes", "list_scenes", "load_box_dataset"]

BOXES_FILE = "boxes.csv"
_EDGES = ("x1", "y1", "x2", "y2")
# Boxes drawn by hand often end a pixel outside.
_TOLERANCE = 1.0


def load_box_dataset(
    source: str | Path, preprocessing: Preprocessing, classes: Classes = None, seed: int = 0, convert_channels: bool = False
) -> Dataset:
    """List and divide the images of a detector, see `qsearch.data.load_dataset`.

    Args:
        source: "demo_detector" (the built-in scenes), or a directory with `boxes.csv`.
        preprocessing: of the model.
        classes: the model's class names, or how many classes it has, or None.
        seed: of the split, where the source has none.
        convert_channels: convert grey or colour images to the model's channels instead of refusing them.

    Raises:
        DataError: the source is missing, malformed or too small.
    """
    if str(source) == "demo_detector":
        listing = list_scenes()
    else:
        table = Path(source) / BOXES_FILE
        if not table.is_file():
            state = "does not exist" if not Path(source).exists() else f"holds no {BOXES_FILE}"
            raise DataError(
                f"data source {source} {state}; a detector needs a directory with {BOXES_FILE}: one row per box with the columns "
                "path, label, x1, y1, x2, y2 and, optionally, split"
            )
        listing = list_boxes(table, classes)
    return Dataset(listing, divide(listing, None, seed), preprocessing, convert_channels)


@dataclass(frozen=True)
class _Row:
    """A line of the table."""

    path: str
    label: str
    edges: tuple[float, ...]
    split: str | None
    place: str


def list_boxes(table: Path, classes: Classes) -> Listing:
    """List the images that a `boxes.csv` names, and what is on them.

    Args:
        table: CSV file with the columns path, label, x1, y1, x2, y2 and, optionally, split; others are ignored. One
            row per box, edges in pixels of the stored image. An image with nothing on it has one row, with label and
            edges empty. Paths are relative to the file's folder, or to that folder's parent.
        classes: of the model.

    Returns:
        The images, by name. For sampling by class, an image is labelled with the class of its largest box, or 0.

    Raises:
        DataError: a column is missing, a value is not allowed, or an image is missing.
    """
    rows = sorted(_read_rows(table), key=lambda row: row.path)
    boxed = [row for row in rows if row.edges]
    if not boxed:
        raise DataError(f"{table} holds no box; expected one row per box with the columns path, label, {', '.join(_EDGES)}")
    indices, names = map_labels([row.label for row in boxed], classes, [row.place for row in boxed], least=1)
    index = dict(zip((row.label for row in boxed), indices, strict=True))
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row.path)]
    paths = [resolve_image(table, group[0].path, group[0].place) for group in groups]
    boxes = tuple(_image_boxes(group, path, index) for group, path in zip(groups, paths, strict=True))
    splits = tuple(_split(group) for group in groups)
    check_splits([split for split in splits if split is not None], [group[0].place for group in groups])
    labels = Labels(tuple(_label(one) for one in boxes), names, None if splits[0] is None else tuple(map(str, splits)))
    listing = listing_of(table.parent.resolve().name, paths, tuple(group[0].path for group in groups), labels)
    return replace(listing, boxes=boxes)


def list_scenes() -> Listing:
    """List the scenes of the built-in detector; they come divided."""
    # Imported here because models stand above data; only this source needs one of them.
    from qsearch.models.demo_detector import CLASSES, load_scenes

    parts = load_scenes()
    scenes = [scene for part in parts.values() for scene in part]
    boxes = tuple(ImageBoxes(scene.boxes, scene.classes, (scene.image.shape[1], scene.image.shape[0])) for scene in scenes)
    return Listing(
        name="demo_detector",
        names=tuple(f"{part}/{index:05d}" for part, found in parts.items() for index in range(len(found))),
        labels=Labels(tuple(_label(one) for one in boxes), CLASSES, tuple(part for part, found in parts.items() for _ in found)),
        versions=tuple((scene.image.size, 0) for scene in scenes),
        open=lambda index: Image.fromarray(scenes[index].image),
        boxes=boxes,
    )


def _label(image: ImageBoxes) -> int:
    areas = (image.boxes[:, 2:] - image.boxes[:, :2]).prod(1)
    return int(image.classes[areas.argmax()]) if len(areas) else 0


def _read_rows(table: Path) -> list[_Row]:
    try:
        check_file(table, MOST_TABLE_BYTES)
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            columns = [column.strip() for column in reader.fieldnames or ()]
            missing = [column for column in ("path", "label", *_EDGES) if column not in columns]
            if missing:
                raise DataError(f"{table} lacks the column {missing[0]!r}; it has {', '.join(columns) or 'none'}")
            reader.fieldnames = columns
            return [_row({name: (row[name] or "").strip() for name in columns}, table, reader.line_num) for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read {table} as a CSV file in UTF-8 ({error})") from error


def _row(row: dict[str, str], table: Path, line: int) -> _Row:
    place, written = f"{table} line {line}", [row[name] for name in _EDGES]
    if not row["path"]:
        raise DataError(f"{place}: the path is empty; fill it in or remove the row")
    if not row["label"] and not any(written):
        return _Row(row["path"], "", (), row.get("split"), place)
    if not row["label"]:
        raise DataError(
            f"{place}: the label is empty; fill it in, or empty {', '.join(_EDGES)} too for an image with nothing on it"
        )
    try:
        edges = tuple(map(float, written))
    except ValueError:
        raise DataError(f"{place}: {', '.join(_EDGES)} must be numbers of pixels; got {', '.join(written)}") from None
    if not all(map(math.isfinite, edges)) or edges[0] >= edges[2] or edges[1] >= edges[3]:
        raise DataError(f"{place}: expected x1 < x2 and y1 < y2, in pixels; got {', '.join(written)}")
    return _Row(row["path"], row["label"], edges, row.get("split"), place)


def _image_boxes(rows: Sequence[_Row], path: Path, index: dict[str, int]) -> ImageBoxes:
    """The boxes of one image, clipped at its edges."""
    width, height = image_size(path)
    boxed = [row for row in rows if row.edges]
    if boxed and len(boxed) < len(rows):
        raise DataError(f"{boxed[0].place}: {path} has a row without a box as well; remove one of them")
    for row in boxed:
        if min(row.edges) < -_TOLERANCE or row.edges[2] > width + _TOLERANCE or row.edges[3] > height + _TOLERANCE:
            raise DataError(f"{row.place}: the box ends outside of {path}, which has {width}x{height} pixels; correct it")
    boxes = np.array([row.edges for row in boxed], np.float32).reshape(-1, 4)
    edge = np.array([width, height] * 2, np.float32)
    return ImageBoxes(boxes.clip(0, edge), np.array([index[row.label] for row in boxed], np.int64), (width, height))


def _split(rows: Sequence[_Row]) -> str | None:
    stray = next((row for row in rows if row.split != rows[0].split), None)
    if stray is not None:
        raise DataError(f"{stray.place}: {stray.path} is in the split {rows[0].split!r} too; an image can be in one only")
    return rows[0].split
