"""Why a configuration lost accuracy, and what to do about it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from qsearch.config import QuantConfig
from qsearch.errors import UsageError
from qsearch.measure.accuracy import mean_divergence
from qsearch.measure.measurement import Accuracy, Memory
from qsearch.measure.task import box_divergence
from qsearch.search.diagnosis.candidates import HIGHER, candidates
from qsearch.search.diagnosis.layer_errors import LayerError, layer_errors
from qsearch.search.diagnosis.remedies import Remedies, Remedy, measure, measure_remedies, nats
from qsearch.search.diagnosis.subject import Subject, open_subject
from qsearch.search.diagnosis.values import Clipped, DeadChannels, clipped_values, dead_channels, grown_ranges
from qsearch.search.evaluation.model_evaluator import ModelEvaluator

__all__ = ["Coverage", "Diagnosis", "DiagnosisLimits", "diagnose", "first_remedy"]

# Share of the time that the errors of layers may take; they are known after few images.
LAYERS_SHARE = 0.25
LEAST_IMAGES = 2
# What a machine's noise makes of the latency of equal modules.
SAME_LATENCY = 1.05


@dataclass(frozen=True)
class DiagnosisLimits:
    """How far a diagnosis goes.

    Attributes:
        images: Search images that layers are looked at with, fewer where they take more than a quarter of the time.
        seconds: After them no remedy is begun any more.
        worst: Layers that higher precisions are tried in.
    """

    images: int = 8
    seconds: float = 120.0
    worst: int = 3


@dataclass(frozen=True)
class Coverage:
    """What the calibration images show.

    Attributes:
        images: Their number.
        classes_seen: Number of classes among them.
        classes_present: Number of classes among all labelled images.
        growth: Node name -> share by which their second half widened its range, for those that it widened most.
        warnings: What is to be known of them, in sentences.
    """

    images: int
    classes_seen: int
    classes_present: int
    growth: Mapping[str, float]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found.

    Attributes:
        config: The configuration.
        accuracy: Of its module on the search images, against float.
        memory: Of its module.
        layers: Errors of all layers, those that cost most first.
        layer_images: Images that these are means over.
        clipped: Clipped values, most first.
        dead: Dead channels.
        coverage: Of the calibration images.
        remedies: What helps.
        first: The remedy to try first; None where none helps.
        seconds: What finding it took.
    """

    config: QuantConfig
    accuracy: Accuracy
    memory: Memory
    layers: tuple[LayerError, ...]
    layer_images: int
    clipped: tuple[Clipped, ...]
    dead: tuple[DeadChannels, ...]
    coverage: Coverage
    remedies: Remedies
    first: Remedy | None
    seconds: float


def diagnose(evaluator: ModelEvaluator, config: QuantConfig, limits: DiagnosisLimits = DiagnosisLimits()) -> Diagnosis:
    """Find out why a configuration lost accuracy.

    Args:
        evaluator: The model, its images and the target.
        config: The configuration.
        limits: How far to go.

    Raises:
        UsageError: The configuration quantizes nothing.
        TrialError: It cannot be built.
    """
    start = time.monotonic()
    subject = open_subject(evaluator, config)
    if set(subject.precision.values()) == {"fp32"}:
        raise UsageError("every layer of this configuration is in fp32, so there is nothing to diagnose: give one that quantizes")
    evaluator.progress("running float and the configuration on the search images")
    before = measure(evaluator, subject.program)
    layers, images = _layers(evaluator, subject, limits)
    worst = [one.layer for one in layers if one.divergence is not None][: limits.worst]
    higher = [name for name in HIGHER if name in evaluator.target.precisions]
    tried = candidates(config, subject.model.graph.layer_types, worst, higher)
    remedies = measure_remedies(evaluator, config, before, tried, start + limits.seconds)
    return Diagnosis(
        config,
        before.accuracy,
        before.memory,
        tuple(layers),
        images,
        tuple(clipped_values(subject)),
        tuple(dead_channels(subject)),
        _coverage(evaluator, subject),
        remedies,
        first_remedy(remedies),
        time.monotonic() - start,
    )


def _layers(evaluator: ModelEvaluator, subject: Subject, limits: DiagnosisLimits) -> tuple[list[LayerError], int]:
    images = evaluator.images("search")[: limits.images]
    evaluator.progress(f"errors of the layers on up to {len(images)} images")
    start = time.monotonic()

    def go_on(done: int) -> bool:
        each = (time.monotonic() - start) / done
        return done < LEAST_IMAGES or each * (done + 1) <= LAYERS_SHARE * limits.seconds

    divergence = box_divergence if evaluator.profile.task == "detection" else mean_divergence
    return layer_errors(subject, images, go_on, divergence)


def _coverage(evaluator: ModelEvaluator, subject: Subject) -> Coverage:
    labels = {part: set(evaluator.dataset.labels(part).tolist()) for part in ("calibration", "search", "heldout")}  # type: ignore[arg-type]
    seen, present = len(labels["calibration"]), len(set().union(*labels.values()))
    warnings = tuple(evaluator.coverage_warnings())
    return Coverage(subject.record.images, seen, present, grown_ranges(subject.record), warnings)


def first_remedy(remedies: Remedies) -> Remedy | None:
    """The remedy to try first: of those that help, and that no other one beats for certain, the one that costs least.

    What keeps the precisions costs less than what raises some, one change less than several, and what is as fast less than
    what is slower. Of several that cost the same it is the one whose outputs are nearest to float's: they tell much
    finer than a count of images does.
    """
    helping = [one for one in remedies.measured if one.helps and not one.not_best]
    return min(helping, key=lambda one: (*one.effort, one.latency_ratio > SAME_LATENCY, nats(one.accuracy)), default=None)
