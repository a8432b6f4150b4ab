"""Statistics that a monitor has recorded, read and checked."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qsearch.bounded import check_archive, check_file, parse_json
from qsearch.errors import DataError
from qsearch.export import monitor, runner
from qsearch.export.verify import read_bundle_preprocessing

__all__ = ["CallStatistics", "read_statistics"]

# As a file and unpacked: 256 images of 3 x 224 x 224 float32 are 154 MB.
MOST_BYTES = 1 << 30
_SHOWN = 100


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
        header, counts, kept = _read(path, again)
        module, digest, batches, images = (header[name] for name in ("module", "digest", "batches", "images"))
        whole = isinstance(module, str) and all(type(one) is int and one >= 0 for one in (batches, images))
    except OSError as error:
        raise DataError(f"cannot read the statistics {path}: {error.strerror or error}") from error
    except DataError:
        raise
    except Exception as error:  # zipfile, numpy and json raise a dozen kinds on bytes that are not theirs
        raise DataError(f"{path} holds no statistics of a monitor, is cut short or is too large; {again}") from error
    if not whole or monitor.digest(counts, kept) != digest or counts.dtype != np.int64 or (counts < 0).any():
        raise DataError(f"{path} is damaged: what it holds is not what was written; {again}")
    if module != manifest["sha256"]["model.so"] or counts.shape != (values, monitor.LEVELS):
        raise DataError(
            f"{path} was recorded with another module (SHA-256 {module[:12]}...) than that of {bundle} "
            f"({manifest['sha256']['model.so'][:12]}...): another model, or another version of it; {again}"
        )
    if not images or not batches:
        raise DataError(f"{path} holds statistics of no image: no call was chosen yet; let the monitor run longer")
    if len(kept):
        given = _as_given(kept, bundle, manifest)
        if given is None:
            raise DataError(f"{path} is damaged: its images are not what the module of {bundle} takes; {again}")
        kept = given
    return CallStatistics(counts, batches, images, kept)


def _read(path: Path, again: str) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Header, counts and images of a file, after a look at how much they are."""
    check_file(path, MOST_BYTES)
    with zipfile.ZipFile(path) as archive:
        check_archive(archive, MOST_BYTES)
    with np.load(path, allow_pickle=False) as arrays:
        header = parse_json(arrays["header"].tobytes())
        found, expected = f"{header['format']} {header['version']}", f"{monitor.FORMAT} {monitor.VERSION}"
        if found != expected:
            raise DataError(f"{path} has format {found[:_SHOWN]}, expected {expected}; {again}")
        both = arrays["counts"], arrays["kept"]
        # Of a member that is no array NumPy gives the bytes.
        if not all(isinstance(one, np.ndarray) for one in both):
            raise ValueError("a member is no array")
        return header, *both


def _as_given(kept: np.ndarray, bundle: Path, manifest: dict[str, Any]) -> np.ndarray | None:
    """Recorded images as the module takes them; None where they are none of its."""
    wanted = manifest["input"]
    if kept.dtype == np.uint8 and kept.ndim == 4 and not runner.takes_pixels(manifest):
        preprocessing = read_bundle_preprocessing(bundle)
        if kept.shape[3] != preprocessing.channels:
            return None
        kept = runner.normalised(kept, preprocessing.to_json())
    fits = list(kept.shape[1:]) == wanted["shape"][1:] and str(kept.dtype) == wanted["dtype"]
    return kept if fits else None
