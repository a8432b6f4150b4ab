"""Check and run a bundle in a fresh process that loads nothing but NumPy and TVM's runtime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from qsearch.bounded import read_json
from qsearch.data import Preprocessing
from qsearch.errors import BundleCorruptError, BundleError, DataError, TargetMismatchError, UnsupportedModelError
from qsearch.export import runner
from qsearch.export.bundle_seal import require_own_bundle
from qsearch.measure.boxes import decode_outputs
from qsearch.models.detection import DetectionHead

__all__ = [
    "detect_images",
    "predict_images",
    "read_bundle_classes",
    "read_bundle_detection",
    "read_bundle_preprocessing",
    "verify_bundle",
]

TIMEOUT_S = 600


def verify_bundle(directory: Path, trust: bool = False) -> dict[str, Any]:
    """Check every file, replay every recorded output, time the module.

    Args:
        directory: The bundle.
        trust: Whether a bundle that this user has not made may be run.

    Returns:
        bundle, files, outputs, mismatching_bits (0), latency_ms, latency_spread_ms, recorded_latency_ms; timing and
        recorded_timing, how each of the two was timed: where these differ, a ratio of the two means nothing.

    Raises:
        BundleCorruptError: A file was changed, or an output differs.
        TargetMismatchError: The bundle is for another machine.
        BundleError: The fresh process failed.
        UntrustedError: The bundle is somebody else's.
    """
    result = _run_fresh(directory, trust)
    if result["mismatching_bits"]:
        remark = read_json(directory / "metrics.json").get("remark")
        raise BundleCorruptError(
            f"{directory} does not replay: {result['mismatching_bits']} of {result['outputs'] * 32} recorded output bits differ; "
            "the machine or the TVM version is not the one that measured it" + (f". Its export said: {remark}" if remark else "")
        )
    return result


def predict_images(directory: Path, images: np.ndarray, trust: bool = False) -> list[list[dict[str, Any]]]:
    """The best classes of preprocessed images.

    Args:
        directory: The bundle.
        images: float32 (N, C, H, W).
        trust: As of `verify_bundle`.

    Returns:
        Per image, best first: class, name, probability; class and name alone of a module that gives nothing else.

    Raises:
        BundleError: As `verify_bundle`.
    """
    if runner.takes_pixels(_manifest(directory)):
        images = read_bundle_preprocessing(directory).pixels_of(images)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "images.npy"
        np.save(path, images, allow_pickle=False)
        return _run_fresh(directory, trust, "predict", str(path))


def detect_images(directory: Path, images: np.ndarray, head: DetectionHead, trust: bool = False) -> list[list[dict[str, Any]]]:
    """What a detector's bundle sees on preprocessed images.

    Args:
        directory: The bundle.
        images: float32 (N, C, H, W).
        head: Of `read_bundle_detection`.
        trust: As of `verify_bundle`.

    Returns:
        Per image, best first: class, name, score, box (left, top, right, bottom; pixels of the module's input).

    Raises:
        BundleError: As `verify_bundle`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given, found = Path(scratch) / "images.npy", Path(scratch) / "outputs.npy"
        np.save(given, images, allow_pickle=False)
        _run_fresh(directory, trust, "outputs", str(given), str(found))
        outputs = np.load(found, allow_pickle=False)
    classes = read_bundle_classes(directory)
    return [
        [
            {"class": int(one), "name": runner.name_of(classes, int(one)), "score": float(score), "box": list(map(float, box))}
            for one, score, box in zip(seen.classes, seen.scores, seen.boxes, strict=True)
        ]
        for seen in decode_outputs(outputs, head, images.shape[2:])  # type: ignore[arg-type]
    ]


def read_bundle_detection(directory: Path) -> DetectionHead | None:
    """How the output of a bundle's module is read as boxes; None for a classifier.

    Raises:
        BundleError: The file is damaged.
    """
    path = directory / runner.DETECTION
    if not path.exists():
        return None
    try:
        return DetectionHead.from_json(read_json(path))
    except (OSError, ValueError, UnsupportedModelError) as error:
        raise BundleCorruptError(f"{path} is damaged: {error}") from error


def read_bundle_preprocessing(directory: Path) -> Preprocessing:
    """How a bundle's module wants its images.

    Raises:
        BundleError: The directory is not a bundle, or a file of it was changed.
    """
    _manifest(directory)
    try:
        return Preprocessing.from_json(read_json(directory / "preprocessing.json"))
    except OSError as error:
        raise BundleError(f"{directory} is not a bundle: preprocessing.json cannot be read ({error.strerror})") from error
    except (ValueError, DataError) as error:
        raise BundleCorruptError(f"{directory}/preprocessing.json is damaged: {error}") from error


def read_bundle_classes(directory: Path) -> tuple[str, ...]:
    """Names of a bundle's classes in the order of its outputs; may be fewer than these.

    Raises:
        BundleError: The file is damaged.
    """
    path = directory / "classes.json"
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise BundleCorruptError(f"{path} is damaged: {error}") from error
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise BundleCorruptError(f"{path} is damaged: it holds no list of names")
    return tuple(found)


def _manifest(directory: Path) -> dict[str, Any]:
    try:
        return runner.read_manifest(directory)
    except runner.BundleProblem as problem:
        raise BundleCorruptError(f"{problem}{_bundles_inside(directory)}") from None


def _bundles_inside(directory: Path) -> str:
    """Which bundles lie in a folder that is none, as those of `export --all` do: the end of a sentence."""
    if (directory / "manifest.json").exists() or not directory.is_dir():
        return ""
    found = sorted(one.parent.name for one in directory.glob("*/manifest.json"))
    return f"; it holds {len(found)}, give one of them: {', '.join(found[:5])}{', ...' if found[5:] else ''}" if found else ""


def _run_fresh(directory: Path, trust: bool, *arguments: str) -> Any:
    """Run this package's own runner, never the bundle's copy: a changed bundle must not run code of its own."""
    require_own_bundle(directory, _manifest(directory), trust)
    environment = os.environ | {"TVM_USE_RUNTIME_LIB": "1"}
    command = [sys.executable, str(Path(runner.__file__)), str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=False)
    except subprocess.TimeoutExpired as error:
        raise BundleError(f"{directory} did not finish within {TIMEOUT_S} s") from error
    lines = done.stdout.strip().splitlines()
    try:
        result = json.loads(lines[-1])
    except (IndexError, ValueError):
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise BundleCorruptError(f"{directory} cannot be run: {reason}") from None
    if "problem" in result if isinstance(result, dict) else False:
        kind = TargetMismatchError if done.returncode == runner.WRONG_MACHINE else BundleCorruptError
        raise kind(result["problem"])
    return result
