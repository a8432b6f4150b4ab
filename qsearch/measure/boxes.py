"""From a detector's output to boxes: decoding, and suppression of boxes that overlap a stronger one of their class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qsearch.models.detection import DetectionHead

__all__ = ["Detections", "decode_outputs", "overlaps", "suppress"]

# The strongest so many of an image are looked at for suppression, whose time grows with their square.
MOST_CANDIDATES = 1000
# Beyond this many e-folds of a stride a distance leaves every image.
LARGEST_LOGARITHM = 12.0


@dataclass(frozen=True, eq=False)
class Detections:
    """What a detector sees on one image, strongest first.

    Attributes:
        boxes: Left, top, right and bottom edges, pixels of the model's input; float32 (n, 4).
        classes: int64 (n,).
        scores: Probabilities, float32 (n,).
    """

    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]
    scores: NDArray[np.float32]


def decode_outputs(outputs: NDArray[np.float32], head: DetectionHead, side: tuple[int, int]) -> list[Detections]:
    """Read a detector's output, see `DetectionHead`.

    Args:
        outputs: float32 (N, positions, 4 + classes), with objectness 5 + classes.
        head: How to read them.
        side: (height, width) of the model's input, pixels.

    Returns:
        Per image what scores at least `head.least_score` and is not suppressed.
    """
    points, strides = _positions(head, side)
    numbers = outputs[..., :4].astype(np.float64)
    lengths = np.exp(np.minimum(numbers, LARGEST_LOGARITHM)) if head.distances == "exp" else np.maximum(numbers, 0)
    lengths *= strides[:, None]
    edges = np.concatenate([points - lengths[..., :2], points + lengths[..., 2:]], -1)
    edges = np.clip(edges, 0, np.array([side[1], side[0]] * 2)).astype(np.float32)
    scores = _sigmoid(outputs[..., head.fixed_channels :])
    if head.objectness:
        scores = scores * _sigmoid(outputs[..., 4:5])
    return [_strongest(boxes, probabilities, head) for boxes, probabilities in zip(edges, scores, strict=True)]


def suppress(boxes: NDArray[np.float32], classes: NDArray[np.int64], most_overlap: float) -> NDArray[np.int64]:
    """Non-maximum suppression within each class: keep a box unless it overlaps one that was kept before it.

    Written here because torchvision's own comes in a compiled extension, which does not load beside every build of torch.

    Args:
        boxes: float32 (n, 4), strongest first.
        classes: int64 (n,).
        most_overlap: Largest intersection over union of two boxes that are both kept.

    Returns:
        Places of the boxes kept, ascending.
    """
    rivals = (overlaps(boxes, boxes) > most_overlap) & (classes[:, None] == classes)
    kept = np.ones(len(boxes), bool)
    for place in range(len(boxes)):
        if kept[place]:
            kept[place + 1 :] &= ~rivals[place, place + 1 :]
    return np.flatnonzero(kept)


def overlaps(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Intersection over union of every pair of boxes.

    Args:
        a: float32 (n, 4).
        b: float32 (m, 4).

    Returns:
        float64 (n, m); 0 for two boxes without area.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    extent = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    shared = extent.clip(0).prod(2)
    union = (a[:, 2:] - a[:, :2]).prod(1)[:, None] + (b[:, 2:] - b[:, :2]).prod(1) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _positions(head: DetectionHead, side: tuple[int, int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the positions lie, x and y in pixels, float64 (positions, 2), and their strides, float64 (positions,)."""
    grids, strides = [], []
    for stride in head.strides:
        y, x = ((np.arange(length // stride) + 0.5) * stride for length in side)
        grids.append(np.stack(np.meshgrid(x, y), -1).reshape(-1, 2))
        strides.append(np.full(len(grids[-1]), float(stride)))
    return np.concatenate(grids), np.concatenate(strides)


def _strongest(edges: NDArray[np.float32], scores: NDArray[np.float64], head: DetectionHead) -> Detections:
    positions, classes = np.nonzero(scores >= head.least_score)
    found = scores[positions, classes]
    order = np.argsort(-found, kind="stable")[:MOST_CANDIDATES]
    boxes, classes, found = edges[positions[order]], classes[order], found[order]
    kept = suppress(boxes, classes, head.most_overlap)[: head.most_boxes]
    return Detections(boxes[kept], classes[kept], found[kept].astype(np.float32))


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    # By way of tanh, which overflows nowhere.
    return 0.5 + 0.5 * np.tanh(0.5 * logits.astype(np.float64))
