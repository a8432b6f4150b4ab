"""Warnings about calibration images that do not suffice."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from qsearch.calibrate.coverage import coverage_warnings, range_growth
from qsearch.calibrate.observe import observe
from qsearch.calibrate.record import StatisticsRecord
from qsearch.models.import_torch import import_model


def record(images: np.ndarray) -> StatisticsRecord:
    torch.manual_seed(0)
    return observe(
        import_model("net", nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU6(), nn.Flatten()).eval(), (1, 1, 4, 4)), images, 4
    )


def alike(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (count, 1, 4, 4)).astype(np.float32)
    images[:, 0, 0, 0], images[:, 0, 1, 1] = -1, 1
    return images


def test_images_that_show_all_there_is_need_no_warning() -> None:
    assert coverage_warnings(record(alike(8)), [0, 1] * 4, 2) == []


def test_missing_classes_are_counted() -> None:
    (warning,) = coverage_warnings(record(alike(8)), [0, 1] * 4, 5)
    assert "8 calibration images show 2 of the 5 classes" in warning


def test_growth_is_told_with_its_amount() -> None:
    images = alike(9)
    # The fifth image belongs to the first half, the sixth does not.
    images[5] *= 3
    found = record(images)
    assert abs(range_growth(found)["input"] - 2.0) < 1e-6
    (warning,) = coverage_warnings(found, [0] * 9, 1)
    widest = max(range_growth(found), key=range_growth(found).__getitem__)
    assert f"{widest!r} most, by {range_growth(found)[widest]:.0%}" in warning
    assert coverage_warnings(record(images[:5]), [0] * 5, 1) == []


def test_a_single_image_is_not_enough_to_tell() -> None:
    (warning,) = coverage_warnings(record(alike(1)), [0], 1)
    assert "one calibration image" in warning
    missing, _ = coverage_warnings(record(alike(1)), [0], 5)
    assert "one calibration image shows 1 of the 5 classes" in missing
