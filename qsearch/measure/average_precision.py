"""How sure a difference in mAP is: detections matched once per image, then images drawn again and again.

The mean average precision of a report is torchmetrics's (`qsearch.measure.mean_average_precision`). It is no mean over images, so
that its interval needs resampling, and hundreds of evaluations by torchmetrics would take minutes per trial. Which
detection finds which thing does not depend on the other images: matching is done once, and a resample only counts
images with other weights. With weight one for each this is COCO's figure itself; a test holds it against torchmetrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qsearch.data.boxes import ImageBoxes
from qsearch.measure.boxes import Detections, overlaps

__all__ = ["RECALLS", "THRESHOLDS", "Matched", "average_precision", "match_all", "paired_interval", "resampled"]

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""Intersections over union from which a box counts as found (Lin et al., "Microsoft COCO", 2014)."""

RECALLS = np.linspace(0.0, 1.0, 101)
"""Recalls at which precision is looked up."""

RESAMPLES = 200
# Of resamples at once: bounds the memory.
CHUNK = 50


@dataclass(frozen=True, eq=False)
class Matched:
    """The detections of one class on all images, strongest first.

    Attributes:
        image: Where each was made, int64 (n,).
        found: Whether it found a thing at each threshold, bool (thresholds, n).
        things: How many there are to find on each image, int64 (images,).
    """

    image: NDArray[np.int64]
    found: NDArray[np.bool_]
    things: NDArray[np.int64]


def match_all(detections: Sequence[Detections], truths: Sequence[ImageBoxes]) -> list[Matched]:
    """Match detections to things, class by class; classes of which there is nothing to find are left out, as COCO does.

    Args:
        detections: Per image.
        truths: Per image, in the same pixels.
    """
    return [_match_class(detections, truths, one) for one in np.unique(np.concatenate([truth.classes for truth in truths]))]


def average_precision(matched: Sequence[Matched], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean average precision over classes and thresholds, the precision interpolated at 101 recalls.

    Args:
        matched: Per class.
        weights: How often each image counts, float64 (resamples, images).

    Returns:
        float64 (resamples,), 0 to 1; a class that a resample has nothing of does not count in it.
    """
    total, counted = np.zeros(len(weights)), np.zeros(len(weights))
    for one in matched:
        things = weights @ one.things
        weight = weights[:, one.image]
        seen = np.maximum(np.cumsum(weight, 1), 1)
        for found in one.found:
            total += _interpolated(np.cumsum(weight * found, 1), seen, things)
        counted += things > 0
    return total / np.maximum(counted * len(THRESHOLDS), 1)


def resampled(matched: Sequence[Matched], images: int) -> NDArray[np.float64]:
    """Mean average precision of images drawn with replacement, as many as there are, again and again.

    Args:
        matched: Per class.
        images: How many images there are.

    Returns:
        float64 (RESAMPLES,); the same draws at every call.
    """
    random, share = np.random.default_rng(0), np.full(images, 1 / images)
    chunks = (random.multinomial(images, share, CHUNK).astype(np.float64) for _ in range(RESAMPLES // CHUNK))
    return np.concatenate([average_precision(matched, weights) for weights in chunks])


def paired_interval(float_resampled: NDArray[np.float64], own_resampled: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of what is lost, percentage points, by the paired bootstrap over images (Efron 1979), percentiles.

    Both saw the same draws, so that what images share cancels, and equal outputs lose exactly nothing.

    Args:
        float_resampled: Of the float module, from `resampled`.
        own_resampled: Of another module on the same images.
    """
    low, high = np.percentile(100.0 * (float_resampled - own_resampled), [2.5, 97.5])
    return float(low), float(high)


def _match_class(detections: Sequence[Detections], truths: Sequence[ImageBoxes], name: int) -> Matched:
    image, scores, found, things = [], [], [], []
    for place, (detected, truth) in enumerate(zip(detections, truths, strict=True)):
        ours, wanted = detected.classes == name, truth.boxes[truth.classes == name]
        things.append(len(wanted))
        image.append(np.full(int(ours.sum()), place))
        scores.append(detected.scores[ours])
        found.append(_match_image(overlaps(detected.boxes[ours], wanted)))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return Matched(np.concatenate(image)[order], np.concatenate(found, 1)[:, order], np.array(things))


def _match_image(iou: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Let each detection in turn, strongest first, find the thing that it overlaps most of those still to be found.

    Args:
        iou: float64 (detections, things).

    Returns:
        bool (thresholds, detections).
    """
    found = np.zeros((len(THRESHOLDS), len(iou)), bool)
    if not iou.size:
        return found
    for row, threshold in zip(found, THRESHOLDS, strict=True):
        left = np.where(iou >= threshold, iou, 0.0)
        for place, overlap in enumerate(left):
            # Of equal ones the last, as COCO's own evaluation has it; the arrays follow.
            best = len(overlap) - 1 - int(overlap[::-1].argmax())
            if overlap[best] > 0:
                row[place] = True
                left[:, best] = 0.0
    return found


def _interpolated(right: NDArray[np.float64], seen: NDArray[np.float64], things: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over recalls of the best precision at that recall or a higher one.

    Args:
        right: Detections that found something, so far; float64 (resamples, n).
        seen: Detections so far, at least 1; float64 (resamples, n).
        things: float64 (resamples,).

    Returns:
        float64 (resamples,).
    """
    if not right.shape[1]:
        return np.zeros(len(right))
    best = np.maximum.accumulate((right / seen)[:, ::-1], 1)[:, ::-1]
    recall = right / np.maximum(things, 1)[:, None]
    places = np.stack([np.searchsorted(row, RECALLS) for row in recall])
    reached = np.take_along_axis(best, np.minimum(places, best.shape[1] - 1), 1)
    return np.where(places < best.shape[1], reached, 0.0).mean(1)
