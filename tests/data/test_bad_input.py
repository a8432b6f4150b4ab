"""Every unusable source is refused with the name of the thing and the way out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from image_folders import PARTS, RGB, divided_rows, write_image, write_table

from qsearch.data import load_dataset
from qsearch.errors import DataError


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist; expected a directory"):
        load_dataset(tmp_path / "nowhere", RGB)
    with pytest.raises(DataError, match=r"a.png is not a directory"):
        load_dataset(write_image(tmp_path / "a.png"), RGB)


def test_empty_and_one_class_directories(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds neither labels.csv nor class folders"):
        load_dataset(tmp_path, RGB)
    for number in range(20):
        write_image(tmp_path / "cat" / f"{number}.png")
    with pytest.raises(DataError, match="all images have the class 'cat'"):
        load_dataset(tmp_path, RGB)
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataError, match=r"dog holds no images"):
        load_dataset(tmp_path, RGB)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_unreadable_image_is_named(folders: Path, tmp_path: Path, damage: str) -> None:
    victim = folders / "dog" / "07.png"
    content = victim.read_bytes()
    victim.write_bytes({"truncated": content[: len(content) // 2], "text": b"not an image", "empty": b""}[damage])
    data = load_dataset(folders, RGB)
    part = next(part for part in PARTS if "dog/07.png" in data.paths(part))
    with pytest.raises(DataError, match=r"dog/07.png is not a readable image"):
        data.images(part, tmp_path / "cache")


def test_grey_image_for_a_colour_model_is_named(folders: Path, tmp_path: Path) -> None:
    for number in range(20):
        write_image(folders / "eel" / f"{number:02d}.png", "L")
    with pytest.raises(DataError, match=r"eel/\d\d.png has 1 channel"):
        load_dataset(folders, RGB).images("search", tmp_path / "cache")
    converted = load_dataset(folders, RGB, convert_channels=True)
    assert len(converted.images("search", tmp_path / "cache")) == 27


def test_too_small_image_is_named(folders: Path, tmp_path: Path) -> None:
    data = load_dataset(folders, dataclasses.replace(RGB, resize=None, crop=(18, 18)))
    with pytest.raises(DataError, match=r"png: the image has 20x16 pixels, the crop needs 18x18; set .* at least 18"):
        data.images("search", tmp_path / "cache")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file": "a.png", "label": "0"}], "lacks the column 'path'; it has file, label"),
        ([{"path": "a.png", "class": "0"}], "lacks the column 'label'"),
        ([{"path": "a.png", "label": "0", "splits": "search"}], "unknown column 'splits'; name it 'split'"),
        ([{"path": "a.png", "label": ""}], "line 2: the path or the label is empty"),
        ([{"path": "missing.jpg", "label": "0"}], "line 2: missing.jpg exists neither in"),
        ([{"path": "a.png", "label": "0", "split": "test"}], "line 2: split must be one of .*; got 'test'"),
        ([{"path": "a.png", "label": "0"}, {"path": "b.png", "label": "10"}], "line 3: label 10 is out of range.* 0 to 9"),
        ([{"path": "a.png", "label": "0"}, {"path": "b.png", "label": "-1"}], "line 3: label -1 is out of range"),
        ([{"path": "a.png", "label": "ant"}, {"path": "b.png", "label": "bee"}], "2 class names .* the model has 10 classes"),
        ([{"path": "a.png", "label": "1"}, {"path": "b.png", "label": "1"}], "all images have the class '1'"),
        (
            [{"path": "a.png", "label": "1", "split": "search"}, {"path": "./a.png", "label": "1", "split": "heldout"}],
            "a.png is already named on line 3, in the splits heldout and search",
        ),
    ],
)
def test_bad_tables(tmp_path: Path, rows: list[dict[str, str]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(write_table(tmp_path / "set", rows), RGB, 10)


def test_table_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe\x00path")
    with pytest.raises(DataError, match=r"cannot read .*labels.csv as a CSV file"):
        load_dataset(tmp_path, RGB)
    (tmp_path / "labels.csv").write_text("path,label\n")
    with pytest.raises(DataError, match="lists no images"):
        load_dataset(tmp_path, RGB)


def test_unknown_class_name_suggests_a_close_one(folders: Path) -> None:
    with pytest.raises(DataError, match="'cat' is not one of the model's 3 classes; did you mean 'cats'"):
        load_dataset(folders, RGB, ("cats", "dog", "eel"))


def test_parts_that_would_be_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the part 'heldout' would be empty, of 16 images; label rows"):
        load_dataset(write_table(tmp_path / "one", divided_rows(16, ("search",))), RGB)
    with pytest.raises(DataError, match="the part 'calibration' would be empty"):
        load_dataset(write_table(tmp_path / "two", divided_rows(3)), RGB)
    with pytest.raises(DataError, match="at least 1, got 0"):
        load_dataset(tmp_path / "two", RGB, calibration_images=0)


def test_demo_images_do_not_fit_other_models() -> None:
    with pytest.raises(DataError, match="have 10 classes, the model has 1000"):
        load_dataset("demo", RGB, 1000)
