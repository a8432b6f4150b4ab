"""What a model is for, and how well it does it: the one interface through which everything above scores a module.

A classifier is scored by top-1 accuracy, a detector by mean average precision. Either gives an `Accuracy`, whose fields
keep the names of the first task there was, `top1_loss_pp` above all, since studies hold them; `Accuracy.metric` says what
they mean, and whatever a person reads says it by that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from qsearch.data.boxes import ImageBoxes
from qsearch.measure.accuracy import compare_accuracy, output_digest
from qsearch.measure.average_precision import match_all, paired_interval, resampled
from qsearch.measure.boxes import decode_outputs
from qsearch.measure.mean_average_precision import mean_average_precision
from qsearch.measure.measurement import MEAN_AVERAGE_PRECISION, Accuracy
from qsearch.models.detection import DetectionHead

__all__ = ["ClassificationScorer", "DetectionScorer", "BOX_DEVIATION", "Scorer", "box_divergence"]

BOX_DEVIATION = 0.1
"""A change of one number of a box that counts as one standard deviation: 10 % of a distance where it is a logarithm."""


class Scorer(Protocol):
    """Scores what a module gives for some images against what is true of them."""

    @property
    def labels(self) -> np.ndarray | None:
        """A right answer per image, int64 (N,); None where the score is no mean over images, so that no part bounds it."""
        ...

    @property
    def count(self) -> int:
        """Number of images."""
        ...

    def compare(self, outputs: np.ndarray, float_outputs: np.ndarray) -> Accuracy:
        """Score a module against float.

        Args:
            outputs: float32 (N, ...) of the module.
            float_outputs: The same of the fp32 module on the same images.
        """
        ...


@dataclass(frozen=True, eq=False)
class ClassificationScorer:
    """Top-1 accuracy.

    Attributes:
        labels: int64 (N,).
    """

    labels: np.ndarray

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.labels)

    def compare(self, outputs: np.ndarray, float_outputs: np.ndarray) -> Accuracy:
        """Score logits, float32 (N, classes) each."""
        return compare_accuracy(outputs, float_outputs, self.labels)


@dataclass(frozen=True, eq=False)
class DetectionScorer:
    """Mean average precision.

    Attributes:
        head: How outputs are read.
        truths: What is on each image, in pixels of the model's input.
        side: (height, width) of the model's input, pixels.
    """

    head: DetectionHead
    truths: tuple[ImageBoxes, ...]
    side: tuple[int, int]
    labels: None = None

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.truths)

    def compare(self, outputs: np.ndarray, float_outputs: np.ndarray) -> Accuracy:
        """Score outputs, float32 (N, positions, channels) each, in percentage points of mAP."""
        float_score, float_resampled = self._float(float_outputs)
        detections = decode_outputs(outputs, self.head, self.side)
        score, at_half = mean_average_precision(detections, self.truths)
        return Accuracy(
            top1=score,
            top5=at_half,
            top1_loss_pp=float_score - score,
            top1_loss_ci_pp=paired_interval(float_resampled, resampled(match_all(detections, self.truths), self.count)),
            images=self.count,
            output_sha256=output_digest(outputs),
            divergence=box_divergence(float_outputs, outputs),
            metric=MEAN_AVERAGE_PRECISION,
        )

    def _float(self, outputs: np.ndarray) -> tuple[float, np.ndarray]:
        """Float's own score, and that of resampled images; computed once for the outputs that every trial is compared with."""
        digest = output_digest(outputs)
        if digest not in self._kept:
            detections = decode_outputs(outputs, self.head, self.side)
            self._kept.clear()
            score, _ = mean_average_precision(detections, self.truths)
            self._kept[digest] = score, resampled(match_all(detections, self.truths), self.count)
        return self._kept[digest]

    @cached_property
    def _kept(self) -> dict[str, tuple[float, np.ndarray]]:
        return {}


def box_divergence(float_outputs: np.ndarray, outputs: np.ndarray) -> float:
    """Mean over images of how far a detector's outputs are from float's, nats.

    The sum over positions of KL(float || module) of each logit's yes or no, and of half the squares of how far the
    numbers of the box moved, in units of BOX_DEVIATION; these count by the strongest of float's probabilities, as a box
    that nobody sees may lie anywhere. To second order it is what `qsearch.search.tables.projection.box_direction` projects on.

    Args:
        float_outputs: float32 (N, positions, 4 + logits).
        outputs: The same of another module.
    """
    expected, given = float_outputs[..., 4:].astype(np.float64), outputs[..., 4:].astype(np.float64)
    p = 0.5 + 0.5 * np.tanh(0.5 * expected)
    # KL of two Bernoulli distributions, by softplus(z) = -log(1 - p).
    logits = p * (expected - given) + np.logaddexp(0, given) - np.logaddexp(0, expected)
    moved = (outputs[..., :4].astype(np.float64) - float_outputs[..., :4]) / BOX_DEVIATION
    boxes = 0.5 * p.max(-1) * (moved**2).sum(-1)
    return max(float((logits.sum(-1) + boxes).sum(1).mean()), 0.0)
