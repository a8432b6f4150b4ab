"""The statistics record: what one float pass leaves behind, enough for every calibration mode.

On disk it is a NumPy archive of plain arrays and one JSON header, never pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from qsearch.bounded import check_archive, parse_json
from qsearch.calibrate.histogram import BINS, Histogram, TensorStatistics
from qsearch.errors import CalibrationError
from qsearch.whole_files import make_folder, write_whole

__all__ = ["StatisticsRecord", "load_record", "save_record"]

_FORMAT = "qsearch-statistics"
_VERSION = 3
# Unpacked: a thousand values with histograms take some tens of MB.
MOST_BYTES = 1 << 31


@dataclass(frozen=True, eq=False)
class StatisticsRecord:
    """Statistics of every value of a model.

    Attributes:
        model_fingerprint: `Model.fingerprint` of the observed model.
        images: Number of images observed.
        tensors: Node name -> statistics, in graph order.
        early: Node name -> (low, high) of what the first half of the images showed, float64 each.
        reads: Layer name -> mean of what each tap of its kernel reads, padding included, float64 (I, kh, kw).
    """

    model_fingerprint: str
    images: int
    tensors: dict[str, TensorStatistics]
    early: dict[str, tuple[float, float]]
    reads: dict[str, np.ndarray]

    @cached_property
    def content_hash(self) -> str:
        """Hexadecimal SHA-256 over everything recorded."""
        digest = hashlib.sha256(json.dumps([self.model_fingerprint, self.images, list(self.tensors)]).encode())
        for _, array in sorted(_arrays(self).items()):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def save_record(record: StatisticsRecord, path: Path) -> None:
    """Write a record; an existing file is replaced only once the new one is complete.

    Raises:
        CalibrationError: The file cannot be written.
    """
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "model_fingerprint": record.model_fingerprint,
        "images": record.images,
        "names": list(record.tensors),
        "reads": {name: mean.shape for name, mean in record.reads.items()},
        "content_hash": record.content_hash,
    }
    try:
        make_folder(path.parent)
        with write_whole(path) as file:
            np.savez_compressed(file, allow_pickle=False, header=np.array(json.dumps(header)), **_arrays(record))
    except OSError as error:
        raise CalibrationError(
            f"cannot write the statistics record {path}: {error.strerror or error}; free some space or choose another folder"
        ) from error


def load_record(path: Path) -> StatisticsRecord:
    """Read a record.

    Raises:
        CalibrationError: The file cannot be read, is not a record, is of another version, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as declared:
            check_archive(declared, MOST_BYTES)
        with np.load(path, allow_pickle=False) as archive:
            header = parse_json(str(archive["header"]))
            if header["format"] != _FORMAT:
                raise ValueError("wrong format name")
            if header["version"] != _VERSION:
                raise CalibrationError(
                    f"statistics record {path} has version {header['version']}, this qsearch reads version {_VERSION}; "
                    "delete the file and the statistics are recorded again"
                )
            tensors = _tensors(header["names"], {key: archive[key] for key in archive.files})
            early = {name: (float(low), float(high)) for name, (low, high) in zip(tensors, archive["early"], strict=True)}
            reads = _reads(header["reads"], archive["reads"])
            record = StatisticsRecord(header["model_fingerprint"], header["images"], tensors, early, reads)
    except OSError as error:
        raise CalibrationError(f"cannot read the statistics record {path}: {error.strerror or error}") from error
    except CalibrationError:
        raise
    except Exception as error:  # zipfile, numpy and json raise a dozen kinds on bytes that are not theirs
        raise CalibrationError(
            f"{path} is not a statistics record, or is damaged; delete it and the statistics are recorded again"
        ) from error
    if record.content_hash != header.get("content_hash"):
        raise CalibrationError(f"statistics record {path} is damaged; delete it and the statistics are recorded again")
    return record


def _arrays(record: StatisticsRecord) -> dict[str, np.ndarray]:
    tensors = list(record.tensors.values())
    return {
        "exponents": np.array([tensor.histogram.exponent for tensor in tensors], np.int64),
        "counts": np.array([tensor.histogram.counts for tensor in tensors], np.int64).reshape(-1, BINS),
        "channels": np.array([len(tensor.channel_minimum) for tensor in tensors], np.int64),
        "channel_minimum": np.concatenate([*(t.channel_minimum for t in tensors), np.zeros(0, np.float32)], dtype=np.float32),
        "channel_maximum": np.concatenate([*(t.channel_maximum for t in tensors), np.zeros(0, np.float32)], dtype=np.float32),
        "channel_sum": np.concatenate([*(t.channel_sum for t in tensors), np.zeros(0)]),
        "reads": np.concatenate([*(mean.reshape(-1) for mean in record.reads.values()), np.zeros(0)]),
        "early": np.array([record.early[name] for name in record.tensors], np.float64).reshape(-1, 2),
    }


def _reads(shapes: dict[str, list[int]], values: np.ndarray) -> dict[str, np.ndarray]:
    parts = np.split(values, np.cumsum([math.prod(shape) for shape in shapes.values()]))
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=False)}


def _tensors(names: list[str], arrays: dict[str, np.ndarray]) -> dict[str, TensorStatistics]:
    ends = np.cumsum(arrays["channels"])[:-1]
    channels = [np.split(arrays[key], ends) for key in ("channel_minimum", "channel_maximum", "channel_sum")]
    rows = zip(names, arrays["exponents"], arrays["counts"], *channels, strict=True)
    return {name: TensorStatistics(Histogram(int(exponent), counts), *rest) for name, exponent, counts, *rest in rows}
