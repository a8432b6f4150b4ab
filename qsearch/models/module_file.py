"""A module that exists in memory only, kept as a file: whoever opens its study later, in any process, finds the same model."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsearch.data import Preprocessing
from qsearch.errors import UnsupportedModelError
from qsearch.models.checkpoint import first_line, hash_tensors, reject_non_finite
from qsearch.models.detection import DetectionHead
from qsearch.models.exported_program import CLASSES_FILE, DETECTION_FILE, PREPROCESSING_FILE
from qsearch.models.import_torch import export_module
from qsearch.whole_files import make_folder, remove_strays, write_whole

__all__ = ["keep_module"]

SHORT = 12


def keep_module(
    module: nn.Module,
    preprocessing: Preprocessing,
    folder: Path,
    classes: tuple[str, ...] | None = None,
    detection: DetectionHead | None = None,
) -> Path:
    """Write a module as a .pt2 file that is named by its class and content; the same content is written once.

    The content is what is computed, operator by operator, every weight, and what the file says of images: another forward
    with the same layers is another model.

    Args:
        module: Left as it is: a copy on the CPU, in evaluation mode, is exported.
        preprocessing: From image to input.
        folder: Where; made if it is not there.
        classes: Class names in the order of the logits; None where they are not known.
        detection: How a detector's output is read; None for a classifier.

    Returns:
        The file.

    Raises:
        UnsupportedModelError: The module cannot be copied, exported or written.
    """
    name = type(module).__name__
    try:
        own = copy.deepcopy(module).cpu().eval()
    except Exception as error:  # Modules may hold anything, and each such thing refuses in its own way.
        raise UnsupportedModelError(f"model {name!r} cannot be copied ({first_line(error)})") from error
    reject_non_finite(own.state_dict(), name)
    program = export_module(name, own, torch.randn((1, *preprocessing.shape), generator=torch.Generator().manual_seed(0)))
    extra = {PREPROCESSING_FILE: json.dumps(preprocessing.to_json(), sort_keys=True)}
    extra |= {} if classes is None else {CLASSES_FILE: json.dumps(list(classes))}
    extra |= {} if detection is None else {DETECTION_FILE: json.dumps(detection.to_json(), sort_keys=True)}
    constants = {key: value for key, value in program.constants.items() if isinstance(value, torch.Tensor)}
    structure = json.dumps([str(program.graph_module.code), extra], sort_keys=True)
    digest = hash_tensors({**program.state_dict, **constants}, structure)
    file = folder / f"{re.sub(r'[^A-Za-z0-9_]+', '-', name)}-{digest[:SHORT]}.pt2"
    if not file.is_file():
        _write(program, file, extra)
    return file


def _write(program: torch.export.ExportedProgram, file: Path, extra: dict[str, Any]) -> None:
    try:
        make_folder(file.parent)
        remove_strays(file)
        with write_whole(file) as stream:
            torch.export.save(program, stream, extra_files=extra)  # type: ignore[arg-type]
    except (OSError, RuntimeError) as error:
        raise UnsupportedModelError(f"the model cannot be kept as {file} ({first_line(error)}); see to the disk") from error
