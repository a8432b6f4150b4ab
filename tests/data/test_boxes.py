"""Boxes of a detector's images: read from a table, and moved with the pixels."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qsearch.data import Preprocessing
from qsearch.data.box_listing import list_boxes, load_box_dataset
from qsearch.data.boxes import ImageBoxes, boxes_in_input
from qsearch.errors import DataError

CLASSES = ("cat", "dog")
HEADER = "path,label,x1,y1,x2,y2"


def preprocessing(resize: int | None, crop: tuple[int, int]) -> Preprocessing:
    return Preprocessing(resize, crop, (0.0,), (1.0,), channels=1, interpolation="bilinear")


def write(folder: Path, *rows: str, header: str = HEADER) -> Path:
    for name in ("a.png", "b.png", "c.png", "d.png"):
        Image.new("L", (40, 20)).save(folder / name)
    table = folder / "boxes.csv"
    table.write_text("\n".join([header, *rows]) + "\n")
    return table


@pytest.mark.parametrize(("resize", "crop"), [(None, (40, 60)), (30, (30, 40)), (61, (48, 64))])
def test_boxes_stay_on_what_they_enclose(resize: int | None, crop: tuple[int, int]) -> None:
    pixels = np.zeros((50, 80), np.uint8)
    pixels[20:32, 30:45] = 255
    image = ImageBoxes(np.array([[30, 20, 45, 32]], np.float32), np.array([1]), (80, 50))
    steps = preprocessing(resize, crop)
    moved = boxes_in_input(image, steps)
    rows, columns = np.nonzero(steps.apply(Image.fromarray(pixels))[0] > 0.5)
    expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(moved.boxes, [expected], atol=1.0)
    assert (moved.size, moved.classes.tolist()) == ((crop[1], crop[0]), [1])


def test_boxes_are_clipped_at_the_crop_and_dropped_when_little_is_left() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 40, 20], [13, 0, 23, 20], [0, 0, 0, 0]], np.float32)
    moved = boxes_in_input(ImageBoxes(boxes, np.array([0, 1, 0, 1]), (40, 20)), preprocessing(None, (20, 20)))
    # The crop keeps the columns 10 to 30; a box that lies wholly outside is gone.
    assert moved.boxes[:2].tolist() == [[0, 0, 20, 20], [3, 0, 13, 20]]
    assert moved.classes[:2].tolist() == [1, 0]


def test_a_table_of_boxes(tmp_path: Path) -> None:
    rows = ("b.png,cat,0,0,10,10", "a.png,dog,1,2,3,4", "b.png,dog,5,0,40.5,20", "c.png,,,,,")
    listing = list_boxes(write(tmp_path, *rows), CLASSES)
    assert listing.names == ("a.png", "b.png", "c.png")
    assert listing.boxes is not None
    assert [one.boxes.tolist() for one in listing.boxes] == [[[1, 2, 3, 4]], [[0, 0, 10, 10], [5, 0, 40, 20]], []]
    assert [one.classes.tolist() for one in listing.boxes] == [[1], [0, 1], []]
    assert listing.labels.indices == (1, 1, 0)
    assert listing.labels.splits is None


def test_the_split_of_a_table(tmp_path: Path) -> None:
    rows = [
        f"{name}.png,cat,0,0,5,5,{part}"
        for name, part in zip("abcd", ("calibration", "search", "search", "heldout"), strict=True)
    ]
    write(tmp_path, *rows, header=f"{HEADER},split")
    dataset = load_box_dataset(tmp_path, preprocessing(None, (20, 20)), ("cat",))
    assert [dataset.paths(part) for part in ("calibration", "search", "heldout")] == [("a.png",), ("b.png", "c.png"), ("d.png",)]
    assert dataset.boxes("search")[0].size == (20, 20)
    before = dataset.fingerprint
    write(tmp_path, *[row.replace("0,0,5,5", "0,0,6,5") for row in rows], header=f"{HEADER},split")
    assert load_box_dataset(tmp_path, preprocessing(None, (20, 20)), ("cat",)).fingerprint != before


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a.png,cat,0,0,5"], "line 2: x1, y1, x2, y2 must be numbers of pixels"),
        (["a.png,cat,0,0,nan,5"], "expected x1 < x2 and y1 < y2"),
        (["a.png,cat,5,0,5,5"], "line 2: expected x1 < x2 and y1 < y2, in pixels; got 5, 0, 5, 5"),
        (["a.png,cat,0,0,50,5"], "line 2: the box ends outside of .*a.png, which has 40x20 pixels"),
        (["a.png,,0,0,5,5"], "line 2: the label is empty"),
        ([",cat,0,0,5,5"], "line 2: the path is empty"),
        (["z.png,cat,0,0,5,5"], "z.png exists neither in"),
        (["a.png,cow,0,0,5,5"], "'cow' is not one of the model's 2 classes"),
        (["a.png,cat,0,0,5,5", "a.png,,,,,"], "has a row without a box as well"),
        (["a.png,,,,,"], "holds no box"),
        ([], "holds no box"),
    ],
)
def test_mistakes_in_a_table(tmp_path: Path, rows: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list_boxes(write(tmp_path, *rows), CLASSES)


def test_mistakes_in_columns_and_splits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lacks the column 'x2'; it has path, label, x1, y1, y2"):
        list_boxes(write(tmp_path, header="path,label,x1,y1,y2"), CLASSES)
    header = f"{HEADER},split"
    with pytest.raises(DataError, match="line 3: a.png is in the split 'search' too"):
        list_boxes(write(tmp_path, "a.png,cat,0,0,5,5,search", "a.png,cat,0,0,6,6,heldout", header=header), CLASSES)
    with pytest.raises(DataError, match="split must be one of calibration, search, heldout; got 'train'"):
        list_boxes(write(tmp_path, "a.png,cat,0,0,5,5,train", header=header), CLASSES)


def test_a_folder_without_the_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no boxes.csv; a detector needs"):
        load_box_dataset(tmp_path, preprocessing(None, (20, 20)))
    with pytest.raises(DataError, match=r"nowhere does not exist; a detector needs"):
        load_box_dataset(tmp_path / "nowhere", preprocessing(None, (20, 20)))
