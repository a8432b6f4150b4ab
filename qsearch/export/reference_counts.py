"""What the tensors of an exported module hold on calibration images: the reference of later statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qsearch.calibrate.drift import DriftReference
from qsearch.export import monitor, rescale, runner
from qsearch.export.scales_record import lookup_tables

__all__ = ["drift_reference", "with_reference"]

# Images that are counted.
MOST_IMAGES = 512


def with_reference(directory: Path, record: dict[str, Any], manifest: dict[str, Any], images: np.ndarray) -> dict[str, Any]:
    """Complete a record of scales by counting integers on calibration images, with the module that monitors use.

    Args:
        directory: Where the module is.
        record: Its scales, with places.
        manifest: With `input` and `target` at least.
        images: As the module takes them.

    Returns:
        The record with its reference; what counts as an image there is a batch.
    """
    import tvm

    tables = lookup_tables(record, rescale.wide_scales_of(record))
    joined = np.concatenate([*tables.values(), np.zeros(0, np.uint8)])
    record = record | {"arrays": record["arrays"] | {"wide_tables": joined}}
    counter = monitor.Counter(directory, record, manifest, tvm)
    batch, counted = manifest["input"]["shape"][0], images[:MOST_IMAGES]
    counts = [counter(given).astype(np.int32) for given in runner.batches_of(counted, batch)]
    found = DriftReference.of_images(np.stack(counts))
    arrays = {"counts": found.counts.astype(np.uint32), "noise": found.noise.astype(np.float32)}
    facts = {"images": found.images, "alarm": found.alarm}
    return record | {"reference": facts, "arrays": record["arrays"] | arrays}


def drift_reference(record: dict[str, Any]) -> DriftReference:
    """The reference that a record holds."""
    arrays, facts = record["arrays"], record["reference"]
    return DriftReference(arrays["counts"].astype(np.int64), facts["images"], arrays["noise"].astype(float), facts["alarm"])
