"""Statistics that a monitor has recorded, read and checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qsearch.errors import DataError
from qsearch.export import monitor, runner

__all__ = ["CallStatistics", "read_statistics"]


@dataclass(frozen=True, eq=False)
class CallStatistics:
    """What a monitor has counted.

    Attributes:
        counts: How often every value held each integer of the module with wider ranges, int64 (values, 256).
        batches: Calls that were counted.
        images: Images in them.
        kept: Some of the images, as the module takes them; none where the monitor was told to keep none.
    """

    counts: np.ndarray
    batches: int
    images: int
    kept: np.ndarray


def read_statistics(path: Path, bundle: Path, manifest: dict[str, Any], values: int) -> CallStatistics:
    """Read a file of statistics.

    Args:
        path: The file.
        bundle: The bundle that it is to be of.
        manifest: Its manifest.
        values: How many values its record of scales has.

    Raises:
        DataError: The file is no such file, is damaged, is of another module, or holds nothing.
    """
    again = "record again with the bundle's monitor.py"
    try:
        with np.load(path, allow_pickle=False) as archive:
            header = json.loads(archive["header"].tobytes())
            found, expected = f"{header['format']} {header['version']}", f"{monitor.FORMAT} {monitor.VERSION}"
            if found != expected:
                raise DataError(f"{path} has format {found}, expected {expected}; {again}")
            counts, kept = archive["counts"], archive["kept"]
    except OSError as error:
        raise DataError(f"cannot read the statistics {path}: {error.strerror or error}") from error
    except DataError:
        raise
    except Exception as error:  # zipfile, numpy and json raise a dozen kinds on bytes that are not theirs
        raise DataError(f"{path} holds no statistics of a monitor, or is cut short; {again}") from error
    if monitor.digest(counts, kept) != header["digest"]:
        raise DataError(f"{path} is damaged: what it holds is not what was written; {again}")
    if header["module"] != manifest["sha256"]["model.so"] or counts.shape != (values, monitor.LEVELS):
        raise DataError(
            f"{path} was recorded with another module (SHA-256 {header['module'][:12]}...) than that of {bundle} "
            f"({manifest['sha256']['model.so'][:12]}...): another model, or another version of it; {again}"
        )
    if not header["images"]:
        raise DataError(f"{path} holds statistics of no image: no call was chosen yet; let the monitor run longer")
    if kept.dtype == np.uint8 and len(kept) and not runner.takes_pixels(manifest):
        preprocessing = json.loads((bundle / "preprocessing.json").read_text(encoding="utf-8"))
        kept = runner.normalised(kept, preprocessing)
    return CallStatistics(counts, header["batches"], header["images"], kept)
