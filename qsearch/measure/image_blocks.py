"""Blocks of images in the order of what they can teach: where an accuracy run may be looked at before its end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from qsearch.measure.accuracy import divergences

__all__ = ["Seen", "Tally", "image_blocks", "loss_bounds", "run_until"]

# Shares of the images that float has right after which a run is looked at; a look costs next to nothing.
LOOKS = (0.01, 0.02, 0.035, 0.05, 0.075, *(round(0.05 * n, 2) for n in range(2, 20)))


@dataclass(frozen=True)
class Seen:
    """What a run has shown so far.

    Attributes:
        images: How many it has been over.
        loss_bounds_pp: Least and greatest loss that it can still end with, see `loss_bounds`.
        divergence: Mean Kullback-Leibler divergence from float over these images, nats. They are not drawn at
            random, so that it is no estimate of the mean over all.
    """

    images: int
    loss_bounds_pp: tuple[float, float]
    divergence: float


class Tally:
    """Counts a run, block by block.

    Args:
        float_right: bool (N,), which images float has right.
    """

    def __init__(self, float_right: np.ndarray) -> None:
        self.float_right = float_right
        self.right, self.seen = np.zeros(len(float_right), bool), np.zeros(len(float_right), bool)
        self.nats = 0.0

    def add(self, block: np.ndarray, right: np.ndarray, nats: np.ndarray) -> Seen:
        """Count a block.

        Args:
            block: Positions of its images, int64 (B,).
            right: bool (B,), which of them the module has right.
            nats: float64 (B,), how far each one's probabilities are from float's.

        Returns:
            What is known from then on.
        """
        self.right[block], self.seen[block] = right, True
        self.nats += float(nats.sum())
        images = int(self.seen.sum())
        return Seen(images, loss_bounds(self.right, self.float_right, self.seen), self.nats / images)


def image_blocks(float_logits: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """Divide images into blocks: first those that float has wrong, then the others by float's margin, least first.

    A module can gain only on images of the first kind, so that after the first block all its gains are known. It loses
    mostly where float's best class was hardly ahead of its second. The order follows from float alone and is the same
    for every trial.

    Args:
        float_logits: float32 (N, classes) of the fp32 module.
        labels: int64 (N,).

    Returns:
        Positions of images, int64, ascending within each block; together all of them.
    """
    two = np.partition(float_logits, -2, axis=1)[:, -2:]
    order = np.argsort(two[:, 1] - two[:, 0], kind="stable")
    right = (float_logits.argmax(1) == labels)[order]
    wrong = int((~right).sum())
    order = np.concatenate([order[~right], order[right]])
    ends = [wrong, *(wrong + round(share * (len(labels) - wrong)) for share in LOOKS)]
    return [np.sort(block) for block in np.split(order, ends) if len(block)]


def loss_bounds(right: np.ndarray, float_right: np.ndarray, seen: np.ndarray) -> tuple[float, float]:
    """Least and greatest top-1 loss that a run can still end with, percentage points.

    Every unseen image that float has wrong may be gained, and every unseen one that it has right may be lost. These
    are limits, not an interval of confidence: they always hold, however often they are looked at.

    Args:
        right: bool (N,), which images the module has right, of those seen.
        float_right: bool (N,), which images float has right.
        seen: bool (N,), which images the module has been run on.
    """
    gained, lost = int((seen & right & ~float_right).sum()), int((seen & ~right & float_right).sum())
    may_gain, may_lose = int((~seen & ~float_right).sum()), int((~seen & float_right).sum())
    # In the form of the result, so that both round alike.
    return 100.0 * (lost - gained - may_gain) / len(seen), 100.0 * (lost - gained + may_lose) / len(seen)


def run_until(
    parts: Iterable[np.ndarray],
    blocks: Sequence[np.ndarray],
    float_logits: np.ndarray,
    labels: np.ndarray,
    look: Callable[[Seen], None],
) -> np.ndarray:
    """Join the logits of blocks, letting somebody look at the run so far after each but the last.

    Args:
        parts: The blocks' logits, float32 (block, classes) each, made as they are asked for.
        blocks: As `image_blocks` gave them.
        float_logits: float32 (N, classes) of the fp32 module.
        labels: int64 (N,).
        look: Ends the run by raising.

    Returns:
        Logits, float32 (N, classes), in image order: what one run over all images gives.
    """
    logits, tally = np.empty_like(float_logits), Tally(float_logits.argmax(1) == labels)
    for part, block in zip(parts, blocks, strict=True):
        logits[block] = part
        seen = tally.add(block, part.argmax(1) == labels[block], divergences(float_logits[block], part))
        if seen.images < len(labels):
            look(seen)
    return logits
