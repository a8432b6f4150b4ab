"""Data that several files use."""

from __future__ import annotations

from pathlib import Path

import pytest
from image_folders import write_image


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A directory with 20 images in each of the classes cat, dog and eel."""
    for label in ("cat", "dog", "eel"):
        for number in range(20):
            write_image(tmp_path / "pets" / label / f"{number:02d}.png", seed=number)
    return tmp_path / "pets"
