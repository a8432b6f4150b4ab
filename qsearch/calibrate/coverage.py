"""Whether calibration images suffice: do they show what there is to see, and did the ranges stop growing?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qsearch.calibrate.record import StatisticsRecord

__all__ = ["coverage_warnings", "range_growth"]

# Shares by which the second half of the images may widen ranges: of one value in ten, of any value.
USUAL_GROWTH, LARGEST_GROWTH = 0.05, 0.25


def range_growth(record: StatisticsRecord) -> dict[str, float]:
    """By what share the second half of the images widened each value's range.

    Args:
        record: Of two images or more; of one image nothing grows.

    Returns:
        Node name -> share of the range that the first half had shown; 0 where neither had any.
    """
    growth = {}
    for name, tensor in record.tensors.items():
        low, high = record.early[name]
        before, after = high - low, tensor.maximum - tensor.minimum
        growth[name] = float(after / before - 1.0) if before > 0 else float(after > 0)
    return growth


def coverage_warnings(record: StatisticsRecord, labels: Sequence[int], present: int) -> list[str]:
    """What a person should know before trusting ranges that were measured on these images.

    Args:
        record: Statistics of the calibration images.
        labels: The images' labels.
        present: How many classes occur among all labelled images.

    Returns:
        Sentences, none where there is nothing to warn of.
    """
    warnings = []
    seen = len(set(labels))
    if seen < present:
        shown = "one calibration image shows" if record.images == 1 else f"{record.images} calibration images show"
        warnings.append(
            f"the {shown} {seen} of the {present} classes of the labelled images: ranges of what is not shown may be clipped"
        )
    if record.images == 1:
        return [*warnings, "one calibration image tells nothing of how ranges vary: give some dozens"]
    growth = range_growth(record)
    values = np.array(list(growth.values()))
    usual, worst = float(np.quantile(values, 0.9)), max(growth, key=lambda name: growth[name])
    if usual > USUAL_GROWTH or growth[worst] > LARGEST_GROWTH:
        warnings.append(
            f"ranges still grow: the second half of the {record.images} calibration images widened one value in ten by "
            f"{usual:.0%} or more, {worst!r} most, by {growth[worst]:.0%}; give more images, or calibrate by percentile or mse"
        )
    return warnings
