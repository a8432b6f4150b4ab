"""Blocks of images in the order of what they can teach: where an accuracy run may be looked at before its end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from qsearch.measure.accuracy import divergences

__all__ = ["ImageHistory", "Seen", "Tally", "loss_bounds"]

# Shares of the images that float has right after which a run is looked at; a look costs next to nothing.
LOOKS = (0.01, 0.02, 0.035, 0.05, 0.075, *(round(0.05 * n, 2) for n in range(2, 20)))
# Whole runs whose divergences are remembered.
WHOLE_RUNS = 32


@dataclass(frozen=True)
class Seen:
    """What a run has shown so far.

    Attributes:
        images: How many it has been over.
        loss_bounds_pp: Least and greatest loss that it can still end with, see `loss_bounds`.
        divergence: Mean Kullback-Leibler divergence from float over all images, nats, estimated from these; None where
            nothing is known to tell it by.
    """

    images: int
    loss_bounds_pp: tuple[float, float]
    divergence: float | None


class Tally:
    """A run so far.

    Attributes:
        seen: bool (N,), which images the module has been run on.
        right: bool (N,), which of them it has right.
        nats: float64 (N,), how far its probabilities are from float's on each of them.
    """

    def __init__(self, count: int) -> None:
        self.seen, self.right, self.nats = np.zeros(count, bool), np.zeros(count, bool), np.zeros(count)

    def add(self, block: np.ndarray, right: np.ndarray, nats: np.ndarray) -> None:
        """Count the images at some positions, int64 (B,)."""
        # Never negative but for rounding, which would turn the sum over a module that is almost float upside down.
        self.seen[block], self.right[block], self.nats[block] = True, right, np.maximum(nats, 0.0)


class ImageHistory:
    """What the runs of one search have shown of its images.

    Args:
        float_logits: float32 (N, classes) of the fp32 module.
        labels: int64 (N,).
    """

    def __init__(self, float_logits: np.ndarray, labels: np.ndarray) -> None:
        self.float_logits, self.labels = float_logits, labels
        self.float_right = float_logits.argmax(1) == labels
        two = np.partition(float_logits, -2, axis=1)[:, -2:]
        self.margin = two[:, 1] - two[:, 0]
        self.lost, self.runs = np.zeros(len(labels)), np.zeros(len(labels))
        self.whole: deque[np.ndarray] = deque(maxlen=WHOLE_RUNS)

    def blocks(self, batch: int = 1) -> list[np.ndarray]:
        """Divide images into blocks: first those that float has wrong, then the others, most often lost first.

        A module can gain only on images of the first kind, so that after the first block all its gains are known. The
        others come in the order of the share of earlier runs that lost them, and then of float's margin, least first: a
        module loses mostly what others have lost, and where float's best class was hardly ahead of its second.

        Args:
            batch: What the number of images in each but the last is a multiple of.

        Returns:
            Positions of images, int64, ascending within each block; together all of them.
        """
        lost_by = self.lost / np.maximum(self.runs, 1)
        order = np.lexsort((self.margin, -lost_by, self.float_right))
        wrong = int((~self.float_right).sum())
        ends = [wrong, *(wrong + round(share * (len(order) - wrong)) for share in LOOKS)]
        return [np.sort(block) for block in np.split(order, [-(-end // batch) * batch for end in ends]) if len(block)]

    def run(self, blocks: Sequence[np.ndarray], parts: Iterable[np.ndarray], look: Callable[[Seen], None]) -> np.ndarray:
        """Join the logits of blocks, letting somebody look at the run so far after each but the last; and remember it.

        Args:
            blocks: As `blocks` gave them.
            parts: Their logits, float32 (block, classes) each, made as they are asked for.
            look: Ends the run by raising.

        Returns:
            Logits, float32 (N, classes), in image order: what one run over all images gives.
        """
        logits, run = np.empty_like(self.float_logits), Tally(len(self.labels))
        try:
            for part, block in zip(parts, blocks, strict=True):
                logits[block] = part
                run.add(block, part.argmax(1) == self.labels[block], divergences(self.float_logits[block], part))
                if not run.seen.all():
                    look(self.seen(run))
        finally:
            self.keep(run)
        return logits

    def seen(self, run: Tally) -> Seen:
        """What is known of a run by now.

        Its divergence over all images is as many times as large as over those that it has seen as it was in the median of
        the whole runs.
        """
        factors = [one.mean() / one[run.seen].mean() for one in self.whole if one[run.seen].any()]
        nats = float(run.nats[run.seen].mean() * np.median(factors)) if factors else None
        return Seen(int(run.seen.sum()), loss_bounds(run.right, self.float_right, run.seen), nats)

    def keep(self, run: Tally) -> None:
        """Remember a run, whole or not."""
        self.lost += run.seen & ~run.right & self.float_right
        self.runs += run.seen
        if run.seen.all():
            self.whole.append(run.nats)


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
