"""Read `.pt2` files, the archives of `torch.export.save`."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import load_pt2

from qsearch.bounded import parse_json
from qsearch.errors import UnsupportedModelError
from qsearch.models.archive_check import check_program_archive
from qsearch.models.checkpoint import first_line

__all__ = ["LoadedProgram", "load_exported_program"]

PREPROCESSING_FILE, CLASSES_FILE, DETECTION_FILE = "preprocessing.json", "classes.json", "detection.json"


@dataclass(frozen=True)
class LoadedProgram:
    """An exported program and what its archive says about images.

    Attributes:
        program: one image tensor in, logits out.
        shape: (C, H, W) of its input.
        preprocessing: JSON form of a `Preprocessing`, from the archive's extra file `preprocessing.json`; None without it.
        classes: class names, from the extra file `classes.json`; None without it.
        detection: JSON form of a `DetectionHead`, from the extra file `detection.json`; None without it.
    """

    program: ExportedProgram
    shape: tuple[int, int, int]
    preprocessing: Any
    classes: tuple[str, ...] | None
    detection: Any = None


def load_exported_program(path: Path) -> LoadedProgram:
    """Load a `.pt2` file without running code from it.

    Args:
        path: written by `torch.export.save`; see `check_program_archive` for what it may hold.

    Returns:
        The program and its input's shape.

    Raises:
        UnsupportedModelError: the file is missing, damaged, or not a classifier of 1- or 3-channel images.
    """
    if not path.is_file():
        raise UnsupportedModelError(f"{path} does not exist; expected a file written by torch.export.save")
    if not zipfile.is_zipfile(path):
        raise UnsupportedModelError(f"{path} is not a .pt2 archive or is damaged; write it again with torch.export.save")
    try:
        check_program_archive(path)
    except Exception as error:  # of whatever a document that is none leads to
        raise UnsupportedModelError(
            f"{path} is refused before torch loads it ({first_line(error)}): it may hold ATen operators and tensors, as "
            "torch.export.save writes them; a network that needs more can be given as package.module:factory"
        ) from error
    try:
        with _careful_loading():
            # Not torch.export.load: what this one cannot read, that tries as an archive of older versions.
            contents = load_pt2(str(path))
            program, extra = contents.exported_programs["model"], contents.extra_files
            # Conditions on sizes, as source: they would be run by whoever runs the program.
            program._guards_code = []
    except Exception as error:  # torch documents no exceptions for damaged archives, and raises a dozen.
        raise UnsupportedModelError(
            f"{path} cannot be loaded by torch {torch.__version__} ({first_line(error)}); write it again with torch.export.save"
        ) from error
    names = _extra(path, extra, CLASSES_FILE)
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UnsupportedModelError(f"{path}: {CLASSES_FILE} must be a list of class names")
    preprocessing = _extra(path, extra, PREPROCESSING_FILE)
    classes, detection = None if names is None else tuple(names), _extra(path, extra, DETECTION_FILE)
    return LoadedProgram(program, _input_shape(path, program), preprocessing, classes, detection)


@contextmanager
def _careful_loading() -> Iterator[None]:
    """Keep torch from unpickling objects out of the archive, and from logging tracebacks of damaged ones."""
    # torch asks for weights_only=False of single tensors and example inputs; this variable is its own switch against that.
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    logger = logging.getLogger("torch.export")
    level = logger.level
    os.environ[variable] = "1"
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _input_shape(path: Path, program: ExportedProgram) -> tuple[int, int, int]:
    """Read (C, H, W) off the only input."""
    names = program.graph_signature.user_inputs
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    shapes = [tuple(value.shape) for name in names if isinstance(value := values.get(str(name)), torch.Tensor)]
    fixed = len(shapes) == 1 and len(shapes[0]) == 4 and all(isinstance(side, int) for side in shapes[0][1:])
    if len(names) != 1 or not fixed or shapes[0][1] not in (1, 3):
        got = ", ".join(str(tuple(map(str, shape))) for shape in shapes) or "none"
        raise UnsupportedModelError(
            f"{path}: expected one input of shape (N, 1 or 3, H, W) with fixed C, H and W; got {len(names)} with shapes {got}"
        )
    _, channels, height, width = shapes[0]
    return channels, height, width


def _extra(path: Path, extra: dict[str, Any], name: str) -> Any:
    """Parse one of the archive's extra files; None where it has none."""
    try:
        return parse_json(extra[name]) if extra.get(name) else None
    except ValueError as error:
        raise UnsupportedModelError(f"{path}: the extra file {name} is not JSON ({error})") from error
