"""Export trials of a study: rebuild the module that was measured, prove that it is the same, bundle it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qsearch.build.link import CompiledModule
from qsearch.data import Preprocessing
from qsearch.errors import BundleError, DataError, StudyMismatchError, UsageError
from qsearch.export import runner
from qsearch.export.bundle import Adaptable, BundleContent, write_bundle
from qsearch.measure.accuracy import output_digest
from qsearch.measure.measurement import Measurement
from qsearch.quantize.program import Program
from qsearch.quantize.whole_pictures import normalised_pixels, with_preprocessing
from qsearch.search.evaluation.objective import ModelEvaluator
from qsearch.search.front import FrontPoint, Heldout
from qsearch.search.provenance import layer_facts

__all__ = [
    "check_classes",
    "check_identity",
    "check_kernels",
    "export_point",
    "export_program",
    "recorded_inputs",
    "require_pictures",
]

# Pictures that a bundle records, and inputs where images are no pictures: each picture gives eight.
RECORDED_PICTURES, RECORDED_INPUTS = 2, 16
WITHOUT_ENDS = "latencies are those of the module without normalisation and the choice of the class, which are inside this one"
NEVER_RUN = (
    "compiled for a device that was not there, and never run: its latency is the device's by the source that the figures name; "
    "the recorded outputs are those of a module for another CPU, of which float layers may differ in their last bits"
)


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


def check_kernels(evaluator: ModelEvaluator, points: Sequence[FrontPoint]) -> None:
    """Refuse to export trials that were measured with other kernels than would be linked now.

    Args:
        evaluator: The study's model, images and target.
        points: The trials.

    Raises:
        BundleError: There are such trials; or they are so old that their kernels were not recorded.
    """
    changed = [point for point in points if _kernels_changed(evaluator, point)]
    if not changed:
        return
    recorded, found = changed[0].measurement.kernels_sha256, evaluator.kernels_sha256(changed[0].config)
    what = (
        f"measured with other kernels (digest {recorded[:12]}) than would be exported now ({found[:12]}): `tune` has chosen "
        "other tiles since, or another version of qsearch generates other code"
        if recorded
        else "measured before qsearch recorded which kernels it measured, so that those exported now may be others"
    )
    raise BundleError(
        f"{_named(changed)}: {what}. Give --remeasure to measure again and bundle the new figures, or search again under another "
        "--study name"
    )


def _named(points: Sequence[FrontPoint]) -> str:
    """Trials by their numbers, and float, which is no trial, by its name."""
    numbers = [str(point.number) for point in points if point.number is not None]
    names = [f"trial{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"] if numbers else []
    return " and ".join([*names, "the float module"] if len(numbers) < len(points) else names)


def _kernels_changed(evaluator: ModelEvaluator, point: FrontPoint) -> bool:
    return evaluator.kernels_sha256(point.config) != point.measurement.kernels_sha256


def _measured_again(evaluator: ModelEvaluator, point: FrontPoint) -> FrontPoint:
    """The same configuration with what its module shows now."""
    evaluator.progress(f"measuring {_named([point])} again: its kernels have changed")
    measurement = evaluator.evaluate(point.config)
    heldout = None if point.heldout is None else Heldout(*evaluator.measure_again([point.config])[0])
    return replace(point, measurement=measurement, heldout=heldout)


def export_point(
    evaluator: ModelEvaluator, point: FrontPoint, baseline: Measurement, directory: Path, with_preprocess: bool = False
) -> dict[str, Any]:
    """Write one trial's bundle.

    A trial whose kernels have changed is measured again, and float with it; metrics and manifest say so. Who wants
    that refused calls `check_kernels` first.

    Args:
        evaluator: The study's model, images and target.
        point: The trial.
        baseline: The study's float module.
        directory: Where to write.
        with_preprocess: The module takes pixels and gives the index of the class.

    Returns:
        trial (None for float), bundle, module_bytes: bytes of the module file, remeasured: whether the figures are new.

    Raises:
        BundleError: The module that is built now is not the one that was measured, or nothing can be written.
    """
    remarks: list[str] = []
    if remeasured := _kernels_changed(evaluator, point):
        before = point.measurement.kernels_sha256[:12] or "unknown"
        remarks.append(f"measured again at export: the kernels of the search's measurement (digest {before}) were others")
        point, baseline = _measured_again(evaluator, point), evaluator.baseline
    if evaluator.away is not None:
        remarks.append(NEVER_RUN)
    if with_preprocess:
        remarks.append(WITHOUT_ENDS)
    metrics = _metrics(point, baseline) | ({"remark": "; ".join(remarks)} if remarks else {})
    module_bytes = _write(evaluator, evaluator.lower(point.config), point, metrics, directory, with_preprocess)
    return {"trial": point.number, "bundle": str(directory), "module_bytes": module_bytes, "remeasured": remeasured}


def export_program(
    evaluator: ModelEvaluator, program: Program, point: FrontPoint, directory: Path, facts: Mapping[str, Any]
) -> int:
    """Write the bundle of a program that has other numbers than its configuration's own, a fine-tuned one for instance.

    Args:
        evaluator: The model, images and target.
        program: What to export.
        point: Its configuration and what was measured of it.
        directory: Where to write.
        facts: What its metrics say besides; `remark` where there is something to say of it.

    Returns:
        Bytes of the module file.

    Raises:
        BundleError: The module that is built now is not the one that was measured, or nothing can be written.
    """
    remarks = [facts["remark"]] if "remark" in facts else []
    remarks += [NEVER_RUN] if evaluator.away is not None else []
    metrics = _metrics(point, evaluator.baseline) | dict(facts) | ({"remark": "; ".join(remarks)} if remarks else {})
    return _write(evaluator, program, point, metrics, directory)


def _write(
    evaluator: ModelEvaluator,
    program: Program,
    point: FrontPoint,
    metrics: dict[str, Any],
    directory: Path,
    with_preprocess: bool = False,
) -> int:
    """Write a bundle once the outputs are those that were measured; returns the bytes of its module."""
    module = evaluator.build(program)
    logits = evaluator.logits(module, "search")
    _check_outputs(point, logits)
    recorded, inputs = recorded_inputs(evaluator.images("search"), evaluator.dataset.preprocessing)
    if with_preprocess:
        program = with_preprocessing(program, evaluator.dataset.preprocessing)
        module, inputs = evaluator.build(program), runner.varied(recorded)
        check_classes(evaluator, module, logits)
    content = BundleContent(
        config=point.config,
        preprocessing=evaluator.dataset.preprocessing.to_json(),
        classes=evaluator.dataset.classes,
        metrics=metrics | _origin(evaluator),
        inputs=recorded,
        outputs=evaluator.outputs(module, inputs),
        takes_pixels=with_preprocess,
        detection=None if evaluator.head is None else evaluator.head.to_json(),
        adaptable=_adaptable(evaluator, with_preprocess),
    )
    write_bundle(directory, evaluator.linker, program, content)
    return (directory / "model.so").stat().st_size


def _adaptable(evaluator: ModelEvaluator, takes_pixels: bool) -> Adaptable | None:
    """What new scales need later; None where the module cannot be run here, or runs on a GPU."""
    if evaluator.away is not None or evaluator.target.arch:
        return None
    preprocessing, images = evaluator.dataset.preprocessing, evaluator.images("calibration")
    if not takes_pixels:
        return Adaptable(evaluator.model, preprocessing.value_range, images)
    given, normalised = preprocessing.pixels_of(images), normalised_pixels(preprocessing)
    return Adaptable(evaluator.model, preprocessing.value_range, given, normalised)


def recorded_inputs(images: np.ndarray, preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
    """What a bundle stores for its replay, and what the module takes of it.

    Pixels take a quarter of the bytes of normalised images, and mirrored and inverted ones none.

    Args:
        images: float32 (N, C, H, W), preprocessed.
        preprocessing: Of the model.

    Returns:
        uint8 (pictures, H, W, C) and float32 (inputs, C, H, W); twice the same where images do not come from pixels.
    """
    try:
        pictures = preprocessing.pixels_of(images[:RECORDED_PICTURES])
    except DataError:
        return images[:RECORDED_INPUTS], images[:RECORDED_INPUTS]
    return pictures, runner.normalised(runner.varied(pictures), preprocessing.to_json())


def require_pictures(evaluator: ModelEvaluator) -> None:
    """Refuse to take pre-processing into a module that it does not fit.

    Raises:
        UsageError: The model is a detector, or is for a GPU.
    """
    if evaluator.head is not None:
        raise UsageError("--with-preprocess is for classifiers: the module of a detector gives no class; leave it out")
    if evaluator.target.arch:
        raise UsageError(f"--with-preprocess is for CPUs, the target is {evaluator.target.description}: leave it out")


def check_classes(evaluator: ModelEvaluator, module: CompiledModule, logits: np.ndarray) -> None:
    """Refuse a module that takes pixels and chooses another class of any search image than the one that was scored.

    Raises:
        BundleError: It does.
    """
    pixels = evaluator.dataset.preprocessing.pixels_of(evaluator.images("search"))
    wrong = int((evaluator.outputs(module, pixels) != logits.argmax(1)).sum())
    if wrong:
        raise BundleError(
            f"with pre-processing inside, the module chooses another class on {wrong} of {len(logits)} search images: this is a "
            "defect of qsearch; export without --with-preprocess"
        )


def _check_outputs(point: FrontPoint, logits: np.ndarray) -> None:
    measured = point.measurement.accuracy
    found = output_digest(logits)
    if found != measured.output_sha256:
        raise BundleError(
            f"{_named([point])} built now gives other outputs (digest {found[:12]}) than it was measured with "
            f"({measured.output_sha256[:12]}): torch, NumPy or TVM has changed since; search again under another --study name"
        )


def _origin(evaluator: ModelEvaluator) -> dict[str, Any]:
    """What was measured, by fingerprints, and its layers: a bundle can be compared with others without its model."""
    return {"identity": evaluator.identity, "layers": layer_facts(evaluator.graph)}


def _metrics(point: FrontPoint, baseline: Measurement) -> dict[str, Any]:
    measured = point.measurement
    metrics: dict[str, Any] = {
        "trial": point.number,
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
            "metric": accuracy.metric,
        }
    return metrics
