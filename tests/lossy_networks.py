"""Classifiers that lose much when they are quantized in a certain way; named on the command line as lossy_networks:NAME."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

PREPROCESSING = {"resize": None, "crop": [16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "channels": 3}
OUTPUTS = 4


def patterns(count: int) -> np.ndarray:
    """Coloured waves with some noise, uint8 (count, 16, 16, 3)."""
    rng = np.random.default_rng(0)
    places = np.arange(16) / 16
    found = []
    for _ in range(count):
        across, down, phase = rng.uniform(0, 3, 3), rng.uniform(0, 3, 3), rng.uniform(0, 6.3, 3)
        wave = np.sin(6.3 * (places[:, None, None] * down + places[None, :, None] * across) + phase)
        found.append(127 + 90 * wave * rng.uniform(0.2, 1, 3) + rng.normal(0, 12, (16, 16, 3)))
    return np.clip(found, 0, 255).astype(np.uint8)


def inputs(count: int) -> torch.Tensor:
    """The same, preprocessed: float32 (count, 3, 16, 16)."""
    return torch.from_numpy(patterns(count)).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)


class Plain(nn.Module):
    """Three layers that int8 suits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1), nn.Linear(16, OUTPUTS)
        self.spoil()
        self.settle()

    def spoil(self) -> None:
        """Do what makes the network hard to quantize."""

    @torch.no_grad()
    def settle(self) -> None:
        """Give all classes about the same share of the images, and distances that matter."""
        given = inputs(120)
        self.head.weight.mul_(5 / self(given).std())
        self.head.bias.sub_(self(given).median(0).values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A clip below zero keeps the channels' scales where they are: equalization cannot help.
        x = nn.functional.hardtanh(self.first(x), -1.0, 6.0)
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


class Outlier(Plain):
    """A channel of the first layer has weights that leave the others none of the steps of a common scale."""

    @torch.no_grad()
    def spoil(self) -> None:
        self.first.weight[3] *= 300.0


class Dead(Plain):
    """A channel without weights; one that never rises above zero."""

    @torch.no_grad()
    def spoil(self) -> None:
        self.first.weight[5] = 0.0
        self.first.bias[5] = 1.0
        self.second.bias[2] = -100.0


def write_labelled(folder: Path, module: nn.Module, count: int = 240) -> Path:
    """Images that the float module has all right."""
    folder.mkdir(parents=True)
    with torch.no_grad():
        labels = module.eval()(inputs(count)).argmax(1).tolist()
    with (folder / "labels.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["path", "label"])
        for index, (pixels, label) in enumerate(zip(patterns(count), labels, strict=True)):
            Image.fromarray(pixels).save(folder / f"{index:03d}.png")
            rows.writerow([f"{index:03d}.png", label])
    return folder
