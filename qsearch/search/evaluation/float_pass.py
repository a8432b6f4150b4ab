"""The float pass over the calibration images, kept between runs."""

from __future__ import annotations

from pathlib import Path

from qsearch.calibrate.observe import observe
from qsearch.calibrate.record import StatisticsRecord, load_record, save_record
from qsearch.data import Dataset
from qsearch.errors import CalibrationError
from qsearch.models.graph import Model
from qsearch.search.evaluation.evaluator import Progress, said_once

__all__ = ["float_statistics"]

OBSERVE_BATCH = 16


def float_statistics(model: Model, dataset: Dataset, cache_dir: Path, progress: Progress) -> StatisticsRecord:
    """The record of the float pass: what was kept of an earlier one, or a new one.

    Args:
        model: The imported model.
        dataset: Its images.
        cache_dir: Where records and decoded images are kept.
        progress: Called whenever a slow step begins.
    """
    path = cache_dir / "statistics" / f"{model.fingerprint[:16]}-{dataset.fingerprint[:16]}.npz"
    if path.is_file():
        try:
            record = load_record(path)
            if record.model_fingerprint == model.fingerprint:
                return record
        except CalibrationError as error:
            progress(f"{error}; running the float pass again")
    images = dataset.images("calibration", cache_dir / "images", said_once(progress, "decoding calibration images"))
    progress(f"float pass over {len(images)} calibration images")
    record = observe(model, images, OBSERVE_BATCH)
    save_record(record, path)
    return record
