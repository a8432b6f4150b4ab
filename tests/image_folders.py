"""Small image folders and tables to test data sets with."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from qsearch.data import Part, Preprocessing

RGB = Preprocessing(resize=16, crop=(12, 12), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
GREY = Preprocessing(resize=None, crop=(8, 8), mean=(0.0,), std=(1.0,), channels=1)
PARTS: tuple[Part, ...] = ("calibration", "search", "heldout")


def write_image(path: Path, mode: str = "RGB", size: tuple[int, int] = (20, 16), seed: int = 0) -> Path:
    """Write an image of noise in the given mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


def write_classes(root: Path, mode: str = "RGB", size: tuple[int, int] = (16, 16), classes: str = "ab") -> Path:
    """Write a folder of 12 images per class, a letter each."""
    for letter in classes:
        for index in range(12):
            write_image(root / letter / f"{index:02d}.png", mode, size, seed=index)
    return root


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
