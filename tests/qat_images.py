"""Images to fine-tune small networks on, made from arrays."""

from __future__ import annotations

import csv
from pathlib import Path

import lossy_networks
import numpy as np
import torch
from networks import SHAPE
from PIL import Image
from torch import nn

from qsearch.data.labels import Labels
from qsearch.data.listing import Listing
from qsearch.data.preprocessing import Preprocessing
from qsearch.qat.training_images import TrainingImages

PREPROCESSING = Preprocessing(resize=None, crop=(SHAPE[2], SHAPE[3]), mean=(0.5,) * 3, std=(0.25,) * 3)


def training_images(classes: int, training: int = 48, validation: int = 16) -> TrainingImages:
    """Noise whose brightness tells the class."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, classes, training + validation)
    bright = 40 + 160 * labels / max(classes - 1, 1)
    pixels = np.clip(rng.normal(bright[:, None, None, None], 30, (len(labels), *SHAPE[2:], 3)), 0, 255).astype(np.uint8)
    listing = Listing(
        name="noise",
        names=tuple(f"{index:03d}" for index in range(len(labels))),
        labels=Labels(tuple(map(int, labels)), tuple(map(str, range(classes))), None),
        versions=((pixels[0].size, 0),) * len(labels),
        open=lambda index: Image.fromarray(pixels[index]),
    )
    indices = range(len(labels))
    return TrainingImages(listing, PREPROCESSING, False, tuple(indices[:training]), tuple(indices[training:]))


def write_training(folder: Path, module: nn.Module, count: int = 64) -> Path:
    """Further images of `lossy_networks`, none of which `write_labelled` has written, labelled by the float module."""
    folder.mkdir(parents=True)
    pixels = lossy_networks.patterns(240 + count)[240:]
    inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)
    with torch.no_grad():
        labels = module.eval()(inputs).argmax(1).tolist()
    with (folder / "labels.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["path", "label"])
        for index, label in enumerate(labels):
            Image.fromarray(pixels[index]).save(folder / f"{index:03d}.png")
            rows.writerow([f"{index:03d}.png", label])
    return folder
