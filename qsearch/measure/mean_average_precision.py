"""Mean average precision as COCO defines it, by torchmetrics."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from qsearch.data.boxes import ImageBoxes
from qsearch.errors import UsageError
from qsearch.measure.average_precision import RECALLS, THRESHOLDS
from qsearch.measure.boxes import Detections
from qsearch.models.torchvision_import import import_torchvision

__all__ = ["MeanPrecision", "mean_average_precision", "require_torchmetrics"]

_NEEDED = ("torchmetrics", "pycocotools")

MeanPrecision = tuple[float, float]
"""Percent: mAP over intersections over union from 0.5 to 0.95, and mAP at 0.5."""


def require_torchmetrics() -> None:
    """Refuse to score detectors where the packages for it are missing.

    Raises:
        UsageError: One is.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"scoring a detector needs {' and '.join(missing)}: install qsearch with its extra, `pip install qsearch[detection]`"
        )


def mean_average_precision(detections: Sequence[Detections], truths: Sequence[ImageBoxes]) -> MeanPrecision:
    """Score detections on some images.

    Args:
        detections: Per image.
        truths: What is there, per image, in the same pixels.

    Raises:
        UsageError: torchmetrics or what it needs is not installed.
    """
    require_torchmetrics()
    # Before torchmetrics, which imports it without the care that it needs beside some builds of torch.
    import_torchvision()
    import torch
    from torchmetrics.detection import MeanAveragePrecision

    # COCO's own thresholds: the defaults are rounded to float32, and a recall of exactly 0.1 falls short of them.
    metric: Any = MeanAveragePrecision("xyxy", "bbox", iou_thresholds=THRESHOLDS.tolist(), rec_thresholds=RECALLS.tolist())
    given = [
        {"boxes": torch.from_numpy(one.boxes), "scores": torch.from_numpy(one.scores), "labels": torch.from_numpy(one.classes)}
        for one in detections
    ]
    wanted = [{"boxes": torch.from_numpy(one.boxes), "labels": torch.from_numpy(one.classes)} for one in truths]
    metric.update(given, wanted)
    found = metric.compute()
    # -1 where no image has anything to find.
    return tuple(max(100.0 * float(found[name]), 0.0) for name in ("map", "map_50"))  # type: ignore[return-value]
