"""Data sets: sources, splits, preprocessing, decoding and the cache."""

from __future__ import annotations

import csv
import dataclasses
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qsearch.data import Dataset, Part, Preprocessing, decode, load_dataset
from qsearch.errors import DataError

PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "data" / "nips2017"
RGB = Preprocessing(resize=16, crop=(12, 12), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
GREY = Preprocessing(resize=None, crop=(8, 8), mean=(0.0,), std=(1.0,), channels=1)
PARTS: tuple[Part, ...] = ("calibration", "search", "heldout")


def write_image(path: Path, mode: str = "RGB", size: tuple[int, int] = (20, 16), seed: int = 0) -> Path:
    """Write an image of noise in the given mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A directory with 20 images in each of the classes cat, dog and eel."""
    for label in ("cat", "dog", "eel"):
        for number in range(20):
            write_image(tmp_path / "pets" / label / f"{number:02d}.png", seed=number)
    return tmp_path / "pets"


def write_table(root: Path, rows: list[dict[str, str]]) -> Path:
    """Write labels.csv with the columns of the first row, and the images it names."""
    root.mkdir(exist_ok=True)
    for number, row in enumerate(rows):
        if row.get("path", "").endswith(".png"):
            write_image(root / row["path"], seed=number)
    with (root / "labels.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root


def divided_rows(per_part: int = 16, parts: tuple[str, ...] = ("search", "heldout")) -> list[dict[str, str]]:
    """Rows of a labels.csv with two classes in every part."""
    return [
        {"path": f"{part}/{number:02d}.png", "label": str(number % 2), "split": part}
        for part in parts
        for number in range(per_part)
    ]


def assert_disjoint_and_complete(data: Dataset, count: int) -> None:
    """Every image is in exactly one part."""
    indices = [index for part in PARTS for index in data.indices(part)]
    assert sorted(indices) == list(range(count))


# Sources and splits


def test_folders_become_classes_and_three_parts(folders: Path) -> None:
    data = load_dataset(folders, RGB)
    assert data.name == "pets"
    assert data.classes == ("cat", "dog", "eel")
    assert_disjoint_and_complete(data, 60)
    assert [len(data.paths(part)) for part in PARTS] == [6, 27, 27]
    for part in PARTS:
        counts = np.bincount(data.labels(part))
        assert counts.max() - counts.min() <= 1
        assert all(path.split("/")[0] == data.classes[label] for path, label in zip(data.paths(part), data.labels(part)))
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
    labels = dict(zip(data.paths("search"), data.labels("search")))
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
    assert all(label == (int(Path(path).stem) + 1) % 2 for path, label in zip(data.paths("search"), data.labels("search")))


def test_wordnet_ids_follow_the_customary_order(tmp_path: Path) -> None:
    for identifier in ("n01440764", "n01443537"):
        for number in range(8):
            write_image(tmp_path / identifier / f"{number}.png", seed=number)
    data = load_dataset(tmp_path, RGB, ("tench", "goldfish"))
    assert data.classes == ("tench", "goldfish")
    assert all((label == 1) == path.startswith("n01443537") for path, label in zip(data.paths("search"), data.labels("search")))


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


# Images


def test_images_are_decoded_once_and_in_order(folders: Path, tmp_path: Path) -> None:
    data = load_dataset(folders, RGB)
    calls: list[tuple[int, int]] = []
    images = data.images("search", tmp_path / "cache", lambda done, total: calls.append((done, total)))
    assert images.shape == (27, 3, 12, 12)
    assert images.dtype == np.float32
    assert not images.flags.writeable
    assert calls == [(done, 27) for done in range(1, 28)]
    for row, path in zip(images, data.paths("search")):
        np.testing.assert_array_equal(row, decode(folders / path, RGB))
    calls.clear()
    np.testing.assert_array_equal(data.images("search", tmp_path / "cache", lambda *args: calls.append(args)), images)
    assert calls == []


def test_carved_parts_share_one_file(tmp_path: Path) -> None:
    data = load_dataset(write_table(tmp_path / "set", divided_rows()), RGB)
    cache = tmp_path / "cache"
    half = data.images("search_half", cache)
    np.testing.assert_array_equal(half, np.concatenate([data.images("search", cache), data.images("calibration", cache)]))
    np.testing.assert_array_equal(data.labels("search_half"), np.concatenate([data.labels("search"), data.labels("calibration")]))
    assert len(list(cache.glob("*.npy"))) == 1


def test_edited_image_is_decoded_again(folders: Path, tmp_path: Path) -> None:
    before = np.array(load_dataset(folders, RGB).images("heldout", tmp_path / "cache"))
    changed = folders / load_dataset(folders, RGB).paths("heldout")[0]
    size = changed.stat().st_size
    write_image(changed, seed=99)
    os.truncate(changed, max(size, changed.stat().st_size))  # Padding after a PNG's end is ignored.
    after = load_dataset(folders, RGB).images("heldout", tmp_path / "cache")
    assert not np.array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1:], after[1:])


def test_interrupted_decoding_leaves_nothing(folders: Path, tmp_path: Path) -> None:
    def interrupt(done: int, _total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    data = load_dataset(folders, RGB)
    with pytest.raises(KeyboardInterrupt):
        data.images("search", tmp_path / "cache", interrupt)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".lock"}
    assert len(data.images("search", tmp_path / "cache")) == 27


def test_full_disk_is_one_clear_error(folders: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # A write beyond it fails as on a full disk.
    try:
        with pytest.raises(DataError, match=r"cannot keep the decoded images in .*cache \(File too large\); free space"):
            load_dataset(folders, RGB).images("search", tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".lock"}


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_colour_images_are_converted_silently(tmp_path: Path, mode: str) -> None:
    path = write_image(tmp_path / ("image.tif" if mode == "CMYK" else "image.png"), mode)
    assert decode(path, RGB).shape == (3, 12, 12)
    with pytest.raises(DataError, match="colour channels, the model wants 1 channel"):
        decode(path, GREY)
    assert decode(path, GREY, convert=True).shape == (1, 8, 8)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "grey palette", "I;16"])
def test_grey_images_need_the_flag_for_a_colour_model(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.png"
    if mode == "grey palette":
        grey = Image.open(write_image(path, "L"))
        grey.convert("P").save(path)
        assert Image.open(path).mode == "P"
    elif mode == "I;16":
        Image.fromarray(np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)).save(path)
    else:
        write_image(path, mode)
    assert decode(path, GREY).shape == (1, 8, 8)
    with pytest.raises(DataError, match=r"image.png has 1 channel .*pass --convert-channels"):
        decode(path, RGB)
    converted = decode(path, RGB, convert=True)
    np.testing.assert_array_equal(converted[0], converted[2])


def test_sixteen_bits_keep_their_high_byte(tmp_path: Path) -> None:
    values = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "image.png")
    np.testing.assert_allclose(decode(tmp_path / "image.png", GREY)[0], (values >> 8) / 255, rtol=1e-6)


# Preprocessing


def test_preprocessing_agrees_with_torchvision(tmp_path: Path) -> None:
    from qsearch.models.torchvision_import import import_torchvision

    transforms = import_torchvision().transforms
    image = Image.open(write_image(tmp_path / "image.png", size=(53, 37)))
    ours = Preprocessing(resize=29, crop=(23, 24), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    theirs = transforms.Compose(
        [
            transforms.Resize(29, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop((23, 24)),
            transforms.ToTensor(),
            transforms.Normalize(ours.mean, ours.std),
        ]
    )
    result = ours.apply(image)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, theirs(image).numpy(), atol=1e-6)


@given(
    st.none() | st.integers(1, 500),
    st.tuples(st.integers(1, 500), st.integers(1, 500)),
    st.sampled_from(["bicubic", "bilinear"]),
    st.sampled_from([1, 3]),
    st.floats(-1, 1),
)
def test_preprocessing_round_trip(resize: int | None, crop: tuple[int, int], filter_: str, channels: int, mean: float) -> None:
    value = Preprocessing(resize, crop, (mean,) * channels, (0.5,) * channels, channels, filter_)  # type: ignore[arg-type]
    assert Preprocessing.from_json(value.to_json()) == value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"std": [0.0, 1.0, 1.0]}, "std must be 3 positive numbers"),
        ({"mean": [0.5]}, "mean must be 3 finite numbers"),
        ({"mean": [float("nan"), 0, 0]}, "mean must be 3 finite numbers"),
        ({"channels": 4}, "channels must be 1 or 3, got 4"),
        ({"interpolation": "nearest"}, "interpolation must be"),
        ({"crop": [224]}, "crop must be two positive integers"),
        ({"crop": [0, 5]}, "crop must be two positive integers"),
        ({"resize": -1}, "resize must be a positive integer or null"),
        ({"size": 3}, "expected the keys"),
    ],
)
def test_impossible_preprocessing_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Preprocessing.from_json({**RGB.to_json(), **change})


# Bad input


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
