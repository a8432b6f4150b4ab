"""Scenes: garments of Fashion-MNIST scattered over a noisy background, with a box and a class each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["SIDE", "Scene", "compose", "compose_all"]

SIDE = 80
"""Height and width of a scene, pixels."""

MOST_GARMENTS = 6
# Of 28 pixels: garments of 17 to 42.
SCALES = (0.6, 1.5)
# Largest part of a garment's box that another one's may cover.
MOST_COVERED = 0.25
PLACING_TRIES = 20
# Brightness at which a pixel of a garment counts as its own, as against the dark around it.
LEAST_BRIGHTNESS = 24
BACKGROUND, NOISE = (0.0, 50.0), (2.0, 14.0)


@dataclass(frozen=True)
class Scene:
    """A picture and what is on it.

    Attributes:
        image: uint8 (SIDE, SIDE).
        boxes: Left, top, right and bottom edge of each garment's pixels, float32 (n, 4).
        classes: int64 (n,).
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]


def compose(garments: NDArray[np.uint8], labels: NDArray[np.int64], random: np.random.Generator) -> Scene:
    """Place garments at random, each at a random size; what finds no room is left out, the first one always fits.

    Args:
        garments: uint8 (n, 28, 28).
        labels: int64 (n,).
        random: Source of randomness.
    """
    canvas = random.normal(random.uniform(*BACKGROUND), random.uniform(*NOISE), (SIDE, SIDE))
    boxes: list[NDArray[np.float32]] = []
    classes = []
    for garment, label in zip(garments, labels, strict=True):
        patch = _trimmed(_scaled(garment, random.uniform(*SCALES)))
        for _ in range(PLACING_TRIES):
            top, left = (int(random.integers(0, SIDE - extent + 1)) for extent in patch.shape)
            box = np.array([left, top, left + patch.shape[1], top + patch.shape[0]], np.float32)
            if all(_covered(box, other) <= MOST_COVERED for other in boxes):
                area = canvas[top : top + patch.shape[0], left : left + patch.shape[1]]
                np.maximum(area, patch, out=area)
                boxes.append(box)
                classes.append(label)
                break
    image = canvas.round().clip(0, 255).astype(np.uint8)
    return Scene(image, np.stack(boxes), np.array(classes, np.int64))


def compose_all(
    garments: NDArray[np.uint8], labels: NDArray[np.int64], count: int, random: np.random.Generator
) -> tuple[Scene, ...]:
    """Compose scenes of one to six garments, drawn without repetition as long as there are any left.

    Args:
        garments: uint8 (n, 28, 28).
        labels: int64 (n,).
        count: How many scenes.
        random: Source of randomness.
    """
    numbers = random.integers(1, MOST_GARMENTS + 1, count)
    rounds = -(-int(numbers.sum()) // len(garments))
    order = np.concatenate([random.permutation(len(garments)) for _ in range(rounds)])
    parts = np.split(order[: numbers.sum()], np.cumsum(numbers)[:-1])
    return tuple(compose(garments[part], labels[part], random) for part in parts)


def _scaled(garment: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    side = round(garment.shape[0] * scale)
    return np.asarray(Image.fromarray(garment).resize((side, side), Image.Resampling.BILINEAR))


def _trimmed(garment: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Cut the dark margins off; a garment that is dark all over stays as it is."""
    bright = garment >= LEAST_BRIGHTNESS
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    return garment if not len(rows) else garment[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _covered(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """The larger of the two shares that the boxes cover of each other."""
    extent = (np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).clip(0)
    smaller = min(np.prod(a[2:] - a[:2]), np.prod(b[2:] - b[:2]))
    return float(np.prod(extent) / smaller)
