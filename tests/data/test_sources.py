"""Sources of images, and how they are split."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from image_folders import GREY, PARTS, RGB, divided_rows, write_image, write_table

from qsearch.data import Dataset, load_dataset

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "nips2017"


def assert_disjoint_and_complete(data: Dataset, count: int) -> None:
    """Every image is in exactly one part."""
    indices = [index for part in PARTS for index in data.indices(part)]
    assert sorted(indices) == list(range(count))


def test_folders_become_classes_and_three_parts(folders: Path) -> None:
    data = load_dataset(folders, RGB)
    assert data.name == "pets"
    assert data.classes == ("cat", "dog", "eel")
    assert_disjoint_and_complete(data, 60)
    assert [len(data.paths(part)) for part in PARTS] == [6, 27, 27]
    for part in PARTS:
        counts = np.bincount(data.labels(part))
        assert counts.max() - counts.min() <= 1
        assert all(
            path.split("/")[0] == data.classes[label] for path, label in zip(data.paths(part), data.labels(part), strict=True)
        )
    assert data.labels("search").dtype == np.int64
    assert data.search_half_calibrating == 0
    assert data.indices("search_half") == data.indices("search")


def test_split_is_stable_and_depends_on_the_seed_only(folders: Path, tmp_path: Path) -> None:
    first = load_dataset(folders, RGB)
    moved = folders.rename(tmp_path / "elsewhere")
    again = load_dataset(moved, RGB)
    assert first.split == again.split
    assert first.fingerprint == again.fingerprint
    other = load_dataset(moved, RGB, seed=1)
    assert other.split != first.split
    assert other.fingerprint != first.fingerprint
    assert_disjoint_and_complete(other, 60)


def test_split_is_the_recorded_one(folders: Path) -> None:
    """A change of the rule would silently mix search and held-out images of existing studies."""
    assert load_dataset(folders, RGB).paths("calibration") == (
        "cat/10.png",
        "cat/12.png",
        "dog/04.png",
        "dog/12.png",
        "eel/00.png",
        "eel/08.png",
    )


def test_fingerprint_covers_preprocessing_and_content(folders: Path) -> None:
    before = load_dataset(folders, RGB).fingerprint
    assert load_dataset(folders, dataclasses.replace(RGB, resize=14)).fingerprint != before
    write_image(folders / "cat" / "00.png", size=(30, 30))
    assert load_dataset(folders, RGB).fingerprint != before


@pytest.mark.parametrize(
    ("wanted", "expected"), [(None, (6, 27, 27)), (3, (3, 27, 30)), (50, (15, 27, 18))], ids=["default", "few", "capped"]
)
def test_number_of_calibration_images(folders: Path, wanted: int | None, expected: tuple[int, int, int]) -> None:
    data = load_dataset(folders, RGB, calibration_images=wanted)
    assert tuple(len(data.indices(part)) for part in PARTS) == expected


def test_folder_names_match_the_models_classes(folders: Path) -> None:
    data = load_dataset(folders, RGB, ("eel", "ant", "dog", "cat"))
    assert data.classes == ("eel", "ant", "dog", "cat")
    labels = dict(zip(data.paths("search"), data.labels("search"), strict=True))
    assert {path.split("/")[0]: label for path, label in labels.items()} == {"eel": 0, "dog": 2, "cat": 3}


@pytest.mark.parametrize("classes", [20, tuple("abcdefghijklmnopqrst"), None])
def test_integer_folders_are_indices(tmp_path: Path, classes: int | tuple[str, ...] | None) -> None:
    for label in ("2", "010"):
        for number in range(8):
            write_image(tmp_path / label / f"{number}.jpg", seed=number)
    data = load_dataset(tmp_path, RGB, classes)
    assert set(data.labels("search")) == {2, 10}
    assert len(data.classes) == (11 if classes is None else 20)


def test_table_without_calibration_rows_carves_it_from_search(tmp_path: Path) -> None:
    data = load_dataset(write_table(tmp_path / "set", divided_rows()), GREY, convert_channels=True)
    assert_disjoint_and_complete(data, 32)
    assert [len(data.indices(part)) for part in PARTS] == [4, 12, 16]
    assert all(path.startswith("search/") for part in ("calibration", "search") for path in data.paths(part))
    assert all(path.startswith("heldout/") for path in data.paths("heldout"))
    assert data.search_half_calibrating == 4
    assert sorted(data.paths("search_half")) == [f"search/{number:02d}.png" for number in range(16)]
    assert np.bincount(data.labels("calibration")).tolist() == [2, 2]


def test_table_with_calibration_rows_is_followed(tmp_path: Path) -> None:
    data = load_dataset(write_table(tmp_path / "set", divided_rows(5, PARTS)), RGB, calibration_images=2)
    for part in PARTS:
        assert data.paths(part) == tuple(f"{part}/{number:02d}.png" for number in range(5))
    assert data.search_half_calibrating == 0


def test_table_paths_may_be_relative_to_the_parent(tmp_path: Path) -> None:
    rows = divided_rows(8)
    root = write_table(tmp_path / "set", rows)
    for row in rows:
        row["path"] = f"set/{row['path']}"
    with (root / "labels.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["path", "label", "split"])
        writer.writeheader()
        writer.writerows(rows)
    data = load_dataset(root, RGB)
    assert data.images("heldout", tmp_path / "cache").shape == (8, 3, 12, 12)


def test_table_with_class_names_and_further_columns(tmp_path: Path) -> None:
    rows = [{"path": f"{n}.png", "label": ("ant", "bee")[n % 2], "author": "someone"} for n in range(12)]
    data = load_dataset(write_table(tmp_path / "set", rows), RGB, ("bee", "ant"))
    assert data.classes == ("bee", "ant")
    assert all(
        label == (int(Path(path).stem) + 1) % 2 for path, label in zip(data.paths("search"), data.labels("search"), strict=True)
    )


def test_wordnet_ids_follow_the_customary_order(tmp_path: Path) -> None:
    for identifier in ("n01440764", "n01443537"):
        for number in range(8):
            write_image(tmp_path / identifier / f"{number}.png", seed=number)
    data = load_dataset(tmp_path, RGB, ("tench", "goldfish"))
    assert data.classes == ("tench", "goldfish")
    assert all(
        (label == 1) == path.startswith("n01443537")
        for path, label in zip(data.paths("search"), data.labels("search"), strict=True)
    )


def test_demo_images_have_the_documented_parts() -> None:
    data = load_dataset("demo", dataclasses.replace(GREY, crop=(28, 28)))
    assert_disjoint_and_complete(data, 10_000)
    assert [len(data.indices(part)) for part in PARTS] == [500, 3500, 6000]
    assert np.bincount(data.labels("calibration")).tolist() == [50] * 10
    assert load_dataset("demo", dataclasses.replace(GREY, crop=(28, 28))).fingerprint == data.fingerprint


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="the sample photographs are not beside the project")
def test_sample_photographs_need_no_flags() -> None:
    data = load_dataset(PHOTOGRAPHS, RGB, 1000)
    assert_disjoint_and_complete(data, 1000)
    assert [len(data.indices(part)) for part in PARTS] == [125, 375, 500]
    assert all("/heldout/" in path for path in data.paths("heldout"))
