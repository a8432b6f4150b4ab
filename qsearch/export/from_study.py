"""Export trials of a study: rebuild the module that was measured, prove that it is the same, bundle it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qsearch.errors import BundleError, StudyMismatchError
from qsearch.export.bundle import BundleContent, write_bundle
from qsearch.measure.accuracy import output_digest, run_images
from qsearch.measure.measurement import Measurement
from qsearch.quantize.lower import lower
from qsearch.search.front import FrontPoint
from qsearch.search.objective import ModelEvaluator

__all__ = ["check_identity", "export_point"]

RECORDED_IMAGES = 16


def check_identity(name: str, recorded: dict[str, str], found: dict[str, str]) -> None:
    """Refuse to export from a model, images or a target other than the study's.

    Args:
        name: The study.
        recorded: Part -> fingerprint, as the study keeps them.
        found: Part -> fingerprint, as they are now.

    Raises:
        StudyMismatchError: One differs.
    """
    changed = [part for part, fingerprint in found.items() if recorded.get(part, fingerprint) != fingerprint]
    if changed:
        raise StudyMismatchError(
            f"study {name!r} measured another {' and '.join(changed)} than is there now: "
            "restore what it was searched with, or search again under another --study name"
        )


def export_point(evaluator: ModelEvaluator, point: FrontPoint, baseline: Measurement, directory: Path) -> dict[str, Any]:
    """Write one trial's bundle.

    Args:
        evaluator: The study's model, images and target.
        point: The trial.
        baseline: The study's float module.
        directory: Where to write.

    Returns:
        trial, bundle, bytes of the module file.

    Raises:
        BundleError: The module that is built now is not the one that was measured, or nothing can be written.
    """
    program = lower(evaluator.model, point.config, evaluator.ranges(point.config), evaluator.weights)
    images = evaluator.images("search")
    logits = run_images(evaluator.build(program).open, images)
    measured = point.measurement.accuracy
    found = output_digest(logits)
    if found != measured.output_sha256:
        raise BundleError(
            f"trial {point.trial} built now gives other outputs (digest {found[:12]}) than it was measured with "
            f"({measured.output_sha256[:12]}): torch, NumPy or TVM has changed since; search again under another --study name"
        )
    content = BundleContent(
        config=point.config,
        preprocessing=evaluator.dataset.preprocessing.to_json(),
        classes=evaluator.dataset.classes,
        metrics=_metrics(point, baseline),
        inputs=images[:RECORDED_IMAGES],
        outputs=logits[:RECORDED_IMAGES],
    )
    write_bundle(directory, evaluator.linker, program, content)
    return {"trial": point.trial, "bundle": str(directory), "module_bytes": (directory / "model.so").stat().st_size}


def _metrics(point: FrontPoint, baseline: Measurement) -> dict[str, Any]:
    measured = point.measurement
    metrics: dict[str, Any] = {
        "trial": point.trial,
        "latency_ms": measured.latency.median_ms,
        "peak_bytes": measured.memory.peak_bytes,
        "search": measured.to_json(),
        "float": baseline.to_json(),
    }
    if point.heldout is not None:
        accuracy = point.heldout.accuracy
        metrics["heldout"] = {
            "latency_ms": point.heldout.latency.median_ms,
            "top1": accuracy.top1,
            "top1_loss_pp": accuracy.top1_loss_pp,
            "top1_loss_ci_pp": list(accuracy.top1_loss_ci_pp),
            "images": accuracy.images,
        }
    return metrics
