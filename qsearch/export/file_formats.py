"""Export a configuration to a file that other programs read, after comparing what the file gives with the module.

The figure that counts is how many images get the same decision. A file below the bar is not written unless that is
asked for.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from qsearch.config import QuantConfig
from qsearch.errors import BundleError, UsageError
from qsearch.export.interchange.onnx_file import run_onnx, runtime_is_there, to_onnx
from qsearch.export.interchange.torch_module import run_archive, save_archive
from qsearch.export.interchange.translate import translate
from qsearch.export.interchange.writer import Rounding
from qsearch.models.detection import DetectionHead
from qsearch.search.evaluation.objective import ModelEvaluator
from qsearch.whole_files import put_in_place

__all__ = ["BAR", "Agreement", "FileFormat", "agreement", "export_file", "require_writable"]

FileFormat = Literal["onnx", "pt2"]
# Share of decisions that must be the module's.
BAR = 0.995
ROUNDINGS: dict[str, tuple[Rounding, ...]] = {"onnx": ("fused", "steps"), "pt2": ("float", "sums")}
NEXT = ": writing layers that sum the integers themselves and multiply by the module's own multipliers"
RUNTIMES = {"onnx": "ONNX Runtime", "pt2": "torch"}


@dataclass(frozen=True)
class Agreement:
    """How far two programs of one configuration give the same.

    Attributes:
        decisions: Images; for a detector, positions of all images.
        same: Those with the same most likely class.
        largest_difference: Between outputs, over the largest magnitude of an output.
    """

    decisions: int
    same: int
    largest_difference: float

    @property
    def share(self) -> float:
        """Same decisions over all."""
        return self.same / self.decisions


def agreement(ours: np.ndarray, theirs: np.ndarray, head: DetectionHead | None = None) -> Agreement:
    """Compare outputs.

    Args:
        ours: float32 (N, classes), or (N, positions, channels) of a detector.
        theirs: As `ours`.
        head: How a detector's output is read; None for a classifier.
    """
    first = 0 if head is None else head.fixed_channels
    same = ours[..., first:].argmax(-1) == theirs[..., first:].argmax(-1)
    reach = float(np.abs(ours).max()) or 1.0
    return Agreement(int(same.size), int(same.sum()), float(np.abs(ours - theirs).max()) / reach)


def require_writable(path: Path, kind: str) -> None:
    """Refuse a file that could not be written, before anything is computed.

    Raises:
        UsageError: It exists, its folder does not, or its name says it is something else.
    """
    if kind not in get_args(FileFormat):
        raise UsageError(f"unknown format {kind!r}: use bundle, {' or '.join(get_args(FileFormat))}")
    if path.suffix != f".{kind}" or not path.parent.is_dir() or path.exists():
        raise UsageError(f"--out: expected a new file ending in .{kind} in a directory that exists, got {path}")


def export_file(
    evaluator: ModelEvaluator, config: QuantConfig, path: Path, kind: FileFormat, force: bool = False
) -> dict[str, Any]:
    """Write a configuration as an ONNX model or as an archive of `torch.export`.

    Args:
        evaluator: The model, its images and the target.
        config: The configuration.
        path: Where; its folder must exist.
        kind: The format.
        force: Write the file although it agrees with the module too rarely.

    Returns:
        file, format, rounding (see `translate`), bytes, agreement: {decisions, same, largest_difference}, or None where
        there is nothing to run the file with.

    Raises:
        UnsupportedModelError: The format has no counterpart of an operation.
        ToolchainError: A package is missing.
        BundleError: The file disagrees with the module, or cannot be written.
    """
    program = evaluator.lower(config)
    logits = evaluator.logits(evaluator.build(program), "search")
    words = _words(evaluator, config)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".export-{os.getpid()}-") as scratch:
            written = Path(scratch) / path.name
            # The plainest first: scales of all values stand in the file. The last is the program's arithmetic itself.
            for rounding in ROUNDINGS[kind]:
                network = translate(program, rounding)
                if kind == "onnx":
                    written.write_bytes(to_onnx(network, evaluator.model.name, words))
                else:
                    save_archive(network, written, words)
                found = _compared(evaluator, logits, written, kind)
                if found is None or found.share >= BAR:
                    break
                evaluator.progress(f"that is less than {100 * BAR} %{'' if rounding == ROUNDINGS[kind][-1] else NEXT}")
            if found is not None:
                _require_agreement(found, kind, force)
            put_in_place(written, path)
    except OSError as error:
        raise BundleError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error
    document = None
    if found is not None:
        document = {"decisions": found.decisions, "same": found.same, "largest_difference": found.largest_difference}
    return {"file": str(path), "format": kind, "rounding": rounding, "bytes": path.stat().st_size, "agreement": document}


def _words(evaluator: ModelEvaluator, config: QuantConfig) -> dict[str, str]:
    """What a reader of the file has to know, under the names that `.pt2` models are read with."""
    found: dict[str, Any] = {
        "config.json": config.to_json(),
        "preprocessing.json": evaluator.dataset.preprocessing.to_json(),
        "classes.json": list(evaluator.dataset.classes),
    }
    if evaluator.head is not None:
        found["detection.json"] = evaluator.head.to_json()
    return {name: json.dumps(value) for name, value in found.items()}


def _compared(evaluator: ModelEvaluator, logits: np.ndarray, written: Path, kind: FileFormat) -> Agreement | None:
    """The file against the module on the search images; None without ONNX Runtime."""
    images = evaluator.images("search")
    if kind == "onnx":
        if not runtime_is_there():
            evaluator.progress("onnxruntime is not installed: the file is not compared with the module")
            return None
        evaluator.progress(f"comparing with ONNX Runtime on {len(images)} images")
        theirs = run_onnx(written, images)
    else:
        evaluator.progress(f"comparing with torch on {len(images)} images")
        theirs = run_archive(written, images)
    found = agreement(logits, theirs, evaluator.head)
    evaluator.progress(
        f"{RUNTIMES[kind]} decides as the module on {found.same} of {found.decisions} "
        f"{'images' if evaluator.head is None else 'positions'} ({100 * found.share:.2f} %)"
    )
    return found


def _require_agreement(found: Agreement, kind: FileFormat, force: bool) -> None:
    if found.share < BAR and not force:
        raise BundleError(
            f"{RUNTIMES[kind]} decides as the module on {100 * found.share:.2f} % of the search images, less than {100 * BAR} %: "
            "no file is written. Layers in fp32 round their last bits differently in every runtime, and 4-bit layers after them "
            "make more of it: give such layers int8 or int16. A CPU without VNNI may saturate sums of int8 products. Or --force"
        )
