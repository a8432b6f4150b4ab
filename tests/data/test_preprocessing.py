"""Resize, crop and normalisation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_folders import RGB, write_image
from PIL import Image

from qsearch.data import Preprocessing, read_preprocessing
from qsearch.errors import DataError


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


def test_a_preprocessing_file(tmp_path: Path) -> None:
    value, path = Preprocessing(32, (28, 28), (0.5,), (0.25,), 1), tmp_path / "preprocessing.json"
    path.write_text(json.dumps(value.to_json()))
    assert read_preprocessing(path) == value
    path.write_text("{")
    with pytest.raises(DataError, match=r"preprocessing\.json is not JSON"):
        read_preprocessing(path)
    with pytest.raises(DataError, match="cannot read preprocessing"):
        read_preprocessing(tmp_path / "nowhere.json")
