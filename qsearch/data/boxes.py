"""What is on an image and where: boxes, and how they follow the image through its preprocessing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qsearch.data.preprocessing import Preprocessing

__all__ = ["ImageBoxes", "boxes_in_input"]

# A box of which less is left in the crop is no longer asked for.
LEAST_VISIBLE = 0.25


@dataclass(frozen=True, eq=False)
class ImageBoxes:
    """The things on one image.

    Attributes:
        boxes: Left, top, right and bottom edges in pixels, from the left upper corner of the image; float32 (n, 4).
        classes: int64 (n,).
        size: (width, height) of the image, pixels.
    """

    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]
    size: tuple[int, int]


def boxes_in_input(image: ImageBoxes, preprocessing: Preprocessing) -> ImageBoxes:
    """Move boxes as resizing and cropping move the pixels.

    Edges are clipped at those of the crop; a box of which less than a quarter remains is dropped.

    Args:
        image: In pixels of the image as it is stored.
        preprocessing: Of the model.

    Returns:
        The same in pixels of the model's input.
    """
    resized = preprocessing.resized(*image.size)
    left, top = preprocessing.crop_corner(*resized)
    height, width = preprocessing.crop
    factor = np.array([resized[0] / image.size[0], resized[1] / image.size[1]] * 2, np.float32)
    boxes = image.boxes * factor - np.array([left, top] * 2, np.float32)
    clipped = np.clip(boxes, 0, np.array([width, height] * 2, np.float32))
    visible = _area(clipped) >= LEAST_VISIBLE * _area(boxes)
    return ImageBoxes(clipped[visible], image.classes[visible], (width, height))


def _area(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)
