"""The built-in model and its images."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from qsearch.errors import DataError
from qsearch.models import demo
from qsearch.models.demo import train
from qsearch.models.demo.images import read_idx

PACKAGE_DATA = Path(demo.__file__).parent / "data"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Keep torch's threads from waiting for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_images_and_labels() -> None:
    images, labels = demo.load_images()
    assert (images.shape, images.dtype) == ((10_000, 28, 28), np.uint8)
    assert (labels.shape, labels.dtype) == ((10_000,), np.int64)
    assert np.bincount(labels).tolist() == [1000] * len(demo.CLASSES)


def test_network_is_the_documented_one() -> None:
    network = demo.build()
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    assert not network.training
    assert 25 <= len(layers) <= 55
    assert {"features.0.0", "features.3.conv.0.0", "features.3.conv.1.0", "features.3.conv.2", "classifier"} <= set(layers)
    assert any(isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1 for layer in layers.values())
    assert network(torch.zeros(2, *demo.PREPROCESSING.shape)).shape == (2, 10)


def test_float_accuracy() -> None:
    images, labels = demo.load_images()
    network = demo.build()
    right = train.accuracy(network, train.normalise(images[:500]), torch.from_numpy(labels[:500]))
    assert right >= 90.0


def test_training_and_deployment_see_the_same_numbers() -> None:
    images, _ = demo.load_images()
    np.testing.assert_allclose(
        demo.PREPROCESSING.apply(Image.fromarray(images[0])), train.normalise(images[:1])[0].numpy(), atol=1e-5
    )


def test_package_data_is_small_and_licensed() -> None:
    assert sum(path.stat().st_size for path in PACKAGE_DATA.iterdir()) < 8_000_000
    assert "Zalando" in (PACKAGE_DATA / "LICENSE.fashion-mnist").read_text()


def test_augmentation_shifts_and_mirrors() -> None:
    image = torch.full((1, 1, 28, 28), -train.MEAN / train.STD)
    image[0, 0, 10, 5] = 1.0
    batch = train.augment(image.repeat(400, 1, 1, 1), torch.Generator().manual_seed(0))
    places = {(int(row), int(column)) for _, _, row, column in (batch == 1.0).nonzero()}
    shifted = {(row, column) for row in range(8, 13) for column in range(3, 8)}
    assert places == shifted | {(row, 27 - column) for row, column in shifted}
    assert (batch == 1.0).sum() == 400


def test_training_is_reproducible(tmp_path: Path) -> None:
    images, labels = demo.load_images()
    recipe = train.Recipe(epochs=2, small_epochs_share=0.5, batch=32, validation_images=16)
    first, second = (
        train.train(images[:112], labels[:112], recipe, tmp_path / f"{name}.safetensors").state_dict() for name in "ab"
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_damaged_image_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    with pytest.raises(DataError, match=r"cannot read .*t10k-labels"):
        read_idx(path)
    for content in (b"no gzip", gzip.compress(b"\0\0\x08\x01\0\0\0\x05abc"), gzip.compress(b"\0")):
        path.write_bytes(content)
        with pytest.raises(DataError, match="t10k-labels"):
            read_idx(path)
    path.write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x03abc"))
    assert read_idx(path).tobytes() == b"abc"
