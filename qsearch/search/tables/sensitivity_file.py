"""The sensitivity table on disk: measured once per model, images and choices, and found again by their content.

A NumPy archive of plain arrays and one JSON header, never pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qsearch.errors import StudyError
from qsearch.search.tables.sensitivity import SensitivityRequest, measure_sensitivity
from qsearch.search.tables.sensitivity_table import Sensitivity
from qsearch.whole_files import make_folder, write_whole

__all__ = ["kept_sensitivity", "load_sensitivity", "save_sensitivity", "sensitivity_path"]

# Raised whenever the same request would be answered with other numbers.
_VERSION = 3


def kept_sensitivity(
    folder: Path, identity: Mapping[str, str], request: SensitivityRequest, progress: Callable[[int, int], None]
) -> Sensitivity:
    """Read a table, or measure and keep it if there is none or only a damaged one.

    Args:
        folder: Where tables are kept.
        identity: Fingerprints of what the ranges were derived from: model and data.
        request: What to measure.
        progress: As for `measure_sensitivity`; not called where the table was kept.

    Returns:
        The table.

    Raises:
        StudyError: It cannot be written.
        QuantizeError: A layer cannot be represented in one of its precisions.
    """
    path = sensitivity_path(folder, identity, request)
    kept = load_sensitivity(path)
    if kept is None:
        kept = measure_sensitivity(request, progress)
        save_sensitivity(kept, path)
    return kept


def sensitivity_path(folder: Path, identity: Mapping[str, str], request: SensitivityRequest) -> Path:
    """The file of a table, named after everything it depends on."""
    images = np.ascontiguousarray(request.images, np.float32)
    asked = {
        "version": _VERSION,
        "identity": {name: identity[name] for name in ("model", "data")},
        "model": request.model.fingerprint,
        "images": hashlib.sha256(images.tobytes()).hexdigest(),
        "seed": request.seed,
        "choices": _choices(request),
    }
    return folder / f"{_digest(json.dumps(asked, sort_keys=True).encode())[:32]}.npz"


def save_sensitivity(table: Sensitivity, path: Path) -> None:
    """Write a table; an existing file is replaced only once the new one is complete.

    Raises:
        StudyError: The file cannot be written.
    """
    header = json.dumps({"version": _VERSION, "sha256": _checksum(table), "choices": _choices(table)})
    try:
        make_folder(path.parent)
        with write_whole(path) as file:
            np.savez(file, allow_pickle=False, header=np.array(header), activation=table.activation, weight=table.weight)
    except OSError as error:
        raise StudyError(
            f"cannot write the sensitivity table {path}: {error.strerror or error}; free some space or choose another folder"
        ) from error


def load_sensitivity(path: Path) -> Sensitivity | None:
    """Read a table; None where there is none, or one that is damaged or of another version."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            header = json.loads(str(archive["header"]))
            table = _table(header["choices"], archive["activation"], archive["weight"])
    except Exception:  # zipfile, numpy, json and pydantic raise a dozen kinds on bytes that are not theirs
        return None
    return table if header["version"] == _VERSION and header["sha256"] == _checksum(table) else None


def _choices(of: Sensitivity | SensitivityRequest) -> dict[str, Any]:
    return {
        "layers": {layer: list(names) for layer, names in of.layers.items()},
        "ranges": list(of.range_keys),
        "weights": list(of.weight_keys),
    }


def _table(choices: dict[str, Any], activation: np.ndarray, weight: np.ndarray) -> Sensitivity:
    return Sensitivity(
        {layer: tuple(names) for layer, names in choices["layers"].items()},
        tuple(choices["ranges"]),
        tuple(choices["weights"]),
        activation,
        weight,
    )


def _checksum(table: Sensitivity) -> str:
    arrays = (np.ascontiguousarray(array, np.float32).tobytes() for array in (table.activation, table.weight))
    # Not sorted: the order of the layers is that of the arrays.
    return _digest(json.dumps(_choices(table)).encode(), *arrays)


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
