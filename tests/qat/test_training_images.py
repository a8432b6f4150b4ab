"""Training images: which are taken, which are left out, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import RGB, divided_rows, write_classes, write_image, write_table

from qsearch.data import Dataset, load_dataset
from qsearch.errors import DataError
from qsearch.qat.training_images import Judged, TrainingImages, builtin_images, directory_images


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    """48 images of two classes."""
    for letter in "ab":
        for index in range(24):
            write_image(tmp_path / "data" / letter / f"{index:02d}.png", seed=index + (100 if letter == "b" else 0))
    return load_dataset(tmp_path / "data", RGB, ("a", "b"))


def judged(data: Dataset, folder: Path) -> Judged:
    return Judged.of(data, lambda: [data.images(part, folder / "cache") for part in ("search", "heldout")])


def opened(folder: Path, data: Dataset, said: list[str], limit: int | None = None) -> TrainingImages:
    return directory_images(folder, data, judged(data, folder.parent), limit, 0, said.append)


def write_others(root: Path, count: int = 20, classes: str = "ab", first: int = 1000) -> Path:
    for place, letter in enumerate(classes):
        for index in range(count):
            write_image(root / letter / f"{index:02d}.png", seed=first + 50 * place + index)
    return root


def test_search_and_heldout_images_are_left_out_whatever_they_are_called(data: Dataset, tmp_path: Path) -> None:
    folder, said = write_others(tmp_path / "train"), []
    stolen = [data.listing.names[index] for index in (*data.indices("search")[:2], data.indices("heldout")[0])]
    for number, name in enumerate(stolen):
        (folder / "a" / f"stolen{number}.png").write_bytes((tmp_path / "data" / name).read_bytes())
    found = opened(folder, data, said)
    assert said == ["3 of 43 training images are search or held-out images as well: they are left out"]
    used = {found.listing.names[index] for index in (*found.training, *found.validation)}
    assert len(used) == 40 and not any("stolen" in name for name in used)
    assert len(found.validation) == 4 and not set(found.training) & set(found.validation)


def test_the_judging_images_themselves_leave_nothing_to_train_on(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="images to train on that are neither search nor held-out images, of 48 in all"):
        opened(tmp_path / "data", data, [])


def test_rows_marked_search_or_heldout_are_left_out(tmp_path: Path) -> None:
    write_table(tmp_path / "both", divided_rows(20, ("calibration", "search", "heldout")))
    data = load_dataset(tmp_path / "both", RGB, 2)
    found = opened(tmp_path / "both", data, [])
    used = {found.listing.names[index] for index in (*found.training, *found.validation)}
    assert used and all(name.startswith("calibration/") for name in used)


def test_a_limit_takes_all_classes_alike(data: Dataset, tmp_path: Path) -> None:
    found = opened(write_others(tmp_path / "train"), data, [], limit=20)
    labels = found.listing.labels.indices
    used = [labels[index] for index in (*found.training, *found.validation)]
    assert sorted(used) == [0] * 10 + [1] * 10
    assert found.fingerprint != opened(tmp_path / "train", data, []).fingerprint


def test_batches_are_shuffled_labelled_and_the_same_for_one_seed(data: Dataset, tmp_path: Path) -> None:
    found = opened(write_others(tmp_path / "train"), data, [])

    def drawn(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        parts = list(found.batches(8, torch.Generator().manual_seed(seed)))
        assert [len(labels) for _, labels in parts] == [8] * (36 // 8)
        return torch.cat([inputs for inputs, _ in parts]), torch.cat([labels for _, labels in parts])

    inputs, labels = drawn(1)
    again, other = drawn(1), drawn(2)
    assert torch.equal(inputs, again[0]) and torch.equal(labels, again[1]) and not torch.equal(inputs, other[0])
    known = {RGB.apply(found.listing.open(index)).tobytes(): found.listing.labels.indices[index] for index in found.training}
    assert [known[row.numpy().tobytes()] for row in inputs] == labels.tolist()
    validation = [len(labels) for _, labels in found.validation_batches(3)]
    assert validation == [3, 1]


def test_other_classes_are_refused(data: Dataset, tmp_path: Path) -> None:
    folder = write_others(tmp_path / "train", classes="abx")
    with pytest.raises(DataError, match="'x' is not one of the model's 2 classes"):
        opened(folder, data, [])


def test_no_images(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        opened(tmp_path / "nowhere", data, [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="neither labels.csv nor class folders"):
        opened(tmp_path / "empty", data, [])
    with pytest.raises(DataError, match="has 4 images to train on.*needs at least 10"):
        opened(write_others(tmp_path / "few", 2), data, [])
    with pytest.raises(DataError, match="dataset-fashion-mnist"):
        builtin_images(data, judged(data, tmp_path), None, 0, str, tmp_path / "nowhere")


def test_an_image_that_cannot_be_read_is_named(data: Dataset, tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "train")
    (folder / "a" / "03.png").write_bytes(b"hello")
    found = opened(folder, data, [])
    with pytest.raises(DataError, match="03.png"):
        for inputs, _ in [*found.batches(2, torch.Generator()), *found.validation_batches(2)]:
            assert np.isfinite(inputs.numpy()).all()
