"""Rounded weights on disk, one file per layer, named after everything that they depend on.

A NumPy archive of plain arrays and one JSON header, never pickle.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from qsearch.errors import StudyError
from qsearch.quantize.weights import QuantizedWeight
from qsearch.whole_files import make_folder, write_whole

__all__ = ["load_rounding", "rounding_path", "save_rounding"]

_FORMAT = "qsearch-rounding"


def rounding_path(folder: Path, content: dict[str, Any]) -> Path:
    """The file of what `content`, plain types, describes."""
    return folder / f"{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]}.npz"


def save_rounding(weight: QuantizedWeight, path: Path, shift: np.ndarray | None = None) -> None:
    """Write a layer's rounded weights; an existing file is replaced only once the new one is complete.

    Args:
        weight: The integers and scales.
        path: Where to.
        shift: What is added to the layer's bias, float32 (O,), where the method gives it.

    Raises:
        StudyError: The file cannot be written.
    """
    arrays = {"values": weight.values, "scale": weight.scale, "group": np.array(weight.group), **weight.tables}
    arrays |= {} if shift is None else {"shift": shift}
    header = json.dumps({"format": _FORMAT, "sha256": _checksum(arrays)})
    try:
        make_folder(path.parent)
        with write_whole(path) as file:
            np.savez_compressed(file, allow_pickle=False, header=np.array(header), **arrays)
    except OSError as error:
        raise StudyError(
            f"cannot write the rounded weights {path}: {error.strerror or error}; free some space or choose another folder"
        ) from error


def load_rounding(path: Path) -> tuple[QuantizedWeight, np.ndarray | None] | None:
    """Read a layer's rounded weights and, where there is one, the shift of its bias.

    Returns:
        None where there is no such file, or a damaged one: it is computed again.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            header = json.loads(str(archive["header"]))
            arrays = {name: archive[name] for name in archive.files if name != "header"}
        if header["format"] != _FORMAT or header["sha256"] != _checksum(arrays):
            return None
        tables = (arrays.get("group_scale"), arrays.get("group_offset"))
        return QuantizedWeight(arrays["values"], arrays["scale"], int(arrays["group"]), *tables), arrays.get("shift")
    except Exception:  # zipfile, numpy and json raise a dozen kinds on bytes that are not theirs
        return None


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
