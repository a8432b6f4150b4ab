"""A diagnosis as plain types, for JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from qsearch.measure.measurement import Accuracy
from qsearch.search.diagnosis.candidates import Candidate
from qsearch.search.diagnosis.diagnosis import Diagnosis
from qsearch.search.diagnosis.layer_errors import LayerError
from qsearch.search.diagnosis.remedies import Remedy

__all__ = ["diagnosis_document"]


def diagnosis_document(diagnosis: Diagnosis) -> dict[str, Any]:
    """Everything that a diagnosis found."""
    remedies, coverage, memory = diagnosis.remedies, diagnosis.coverage, diagnosis.memory
    return {
        "config": diagnosis.config.to_json(),
        "accuracy": _accuracy(diagnosis.accuracy),
        "peak_bytes": memory.peak_bytes,
        "weight_bytes": memory.weight_bytes,
        "layers": [_layer(one) for one in diagnosis.layers],
        "layer_images": diagnosis.layer_images,
        "clipped": [asdict(one) for one in diagnosis.clipped],
        "dead_channels": [asdict(one) | {"channels": list(one.channels)} for one in diagnosis.dead],
        "coverage": asdict(coverage) | {"growth": dict(coverage.growth), "warnings": list(coverage.warnings)},
        "remedies": [_remedy(one, diagnosis.accuracy) for one in remedies.measured],
        "unchanged": remedies.unchanged,
        "skipped": remedies.skipped,
        "failed": remedies.failed,
        "first": None if diagnosis.first is None else _candidate(diagnosis.first.candidate),
        "seconds": diagnosis.seconds,
    }


def _accuracy(accuracy: Accuracy) -> dict[str, Any]:
    return {
        "top1": accuracy.top1,
        "top1_loss_pp": accuracy.top1_loss_pp,
        "top1_loss_ci_pp": list(accuracy.top1_loss_ci_pp),
        "divergence": accuracy.divergence,
        "images": accuracy.images,
    }


def _layer(one: LayerError) -> dict[str, Any]:
    return asdict(one) | {"activation_share": one.activation_share}


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {"name": candidate.name, "kind": candidate.kind, "change": candidate.change}


def _remedy(one: Remedy, before: Accuracy) -> dict[str, Any]:
    return {
        **_candidate(one.candidate),
        "loss_before_pp": before.top1_loss_pp,
        "loss_pp": one.accuracy.top1_loss_pp,
        "gain_pp": one.gain_pp,
        "gain_ci_pp": list(one.gain_ci_pp),
        "helps": one.helps,
        "divergence": one.accuracy.divergence,
        "latency_ratio": one.latency_ratio,
        "peak_bytes": one.memory.peak_bytes,
        "weight_bytes": one.memory.weight_bytes,
    }
