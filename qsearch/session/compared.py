"""One side of a comparison: a point of a study, a bundle, or a configuration file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from qsearch.bounded import read_file, read_json, shortened
from qsearch.config import LayerType, QuantConfig, load_config, validation_message
from qsearch.errors import BundleCorruptError, StudyError, UsageError
from qsearch.export import runner
from qsearch.measure.measurement import TOP1, Accuracy, Latency, Measurement
from qsearch.report.documents import baseline_of, run_of, study_document
from qsearch.search.front import FrontPoint, measurement_from_json, pick, study_front, study_point
from qsearch.search.study import StudyHandle, load_study, recorded_parts

__all__ = ["Compared", "open_compared"]

FORMS = (
    "a study (NAME, NAME:TRIAL, or NAME:knee, fastest, smallest, most-accurate), a bundle (a directory that export wrote), or a "
    "configuration (a file ending in .json)"
)


@dataclass(frozen=True)
class Compared:
    """One side of a comparison.

    Attributes:
        title: What it is, for people.
        kind: study, bundle or configuration.
        config: The configuration.
        metrics: What was measured of it; None of a configuration file.
        layers: name, type and weights of the model's layers in order; empty where it is not known.
        identity: Fingerprints of what was measured: model, data, target; empty where they are not known.
        front: Of a study given by its name alone: points, hypervolume and trials; None else.
    """

    title: str
    kind: Literal["study", "bundle", "configuration"]
    config: QuantConfig
    metrics: Mapping[str, Any] | None = None
    layers: Sequence[Mapping[str, Any]] = ()
    identity: Mapping[str, str] = field(default_factory=dict)
    front: Mapping[str, Any] | None = None


class _Layer(BaseModel):
    name: str
    type: LayerType
    weights: int | None = None


class _Heldout(BaseModel):
    latency_ms: float
    latency_spread_ms: float | None = None
    top1: float
    top1_loss_pp: float
    top1_loss_ci_pp: tuple[float, float]
    images: int
    metric: str = TOP1


class _Told(BaseModel):
    """What a bundle's metrics say."""

    search: dict[str, Any]
    baseline: dict[str, Any] = Field(alias="float")
    trial: int | None = None
    heldout: _Heldout | None = None
    layers: tuple[_Layer, ...] = ()
    identity: dict[str, str] | None = None


def open_compared(given: str, storage: str | None = None) -> Compared:
    """Find out what a side is, and read it.

    Args:
        given: As the user wrote it.
        storage: SQLAlchemy URL of studies; by default each has its own file under studies/.

    Raises:
        UsageError: It is none of the three.
        QSearchError: It is one, and cannot be read.
    """
    path = Path(given)
    if path.is_dir():
        if not (path / "manifest.json").is_file():
            raise UsageError(f"{given} is a directory and no bundle (it has no manifest.json); expected {FORMS}")
        return _bundle(path)
    if given.endswith(".json"):
        return Compared(f"configuration {given}", "configuration", load_config(path))
    name, _, which = given.partition(":")
    try:
        handle = load_study(name, storage)
    except (StudyError, UsageError) as error:
        raise UsageError(f"{given!r} is nothing to compare: {error}. Expected {FORMS}") from error
    return _study(handle, which)


def _study(handle: StudyHandle, which: str) -> Compared:
    with handle.guard():
        baseline = baseline_of(handle)
        if baseline is None:
            raise StudyError(f"study {handle.name!r} has measured nothing yet; run its search command once more")
        point = _point(handle, which, baseline)
        run, identity = run_of(handle), recorded_parts(handle.study)
    document = study_document(handle)
    how = "" if which.isdecimal() else f" ({which or 'knee'})"
    title = f"study {handle.name}, {'float' if point.number is None else f'trial {point.number}'}{how}"
    front = {"points": len(document["front"]), "hypervolume": document["hypervolume"], "trials": document["trials"]}
    heldout = None if point.heldout is None else _again(point.heldout.accuracy, point.heldout.latency)
    metrics = _metrics(point.measurement, baseline, heldout)
    layers = run.get("layers") or ()
    return Compared(title, "study", point.config, metrics, layers, identity, None if which else front)


def _point(handle: StudyHandle, which: str, baseline: Measurement) -> FrontPoint:
    if which.isdecimal():
        return study_point(handle.study, int(which))
    try:
        return pick(study_front(handle.study), which or "knee", baseline=baseline)
    except StudyError as error:
        raise StudyError(f"study {handle.name!r}: {error}; {handle.name}:TRIAL names a trial that is not on its front") from error


def _bundle(path: Path) -> Compared:
    """Read a bundle, which anybody may have made: no code of it is run, and what its documents say is checked."""
    try:
        manifest = runner.read_manifest(path)
        told = _Told.model_validate(read_json(path / "metrics.json"))
        config = QuantConfig.model_validate_json(read_file(path / "config.json"))
        heldout = None if told.heldout is None else told.heldout.model_dump()
        metrics = _metrics(_measurement(told.search), _measurement(told.baseline), heldout)
        # Neither NaN nor infinity is JSON, though Python reads them as such.
        json.dumps(metrics, allow_nan=False)
    except runner.BundleProblem as problem:
        raise BundleCorruptError(str(problem)) from None
    except ValidationError as error:
        raise BundleCorruptError(f"{path} is damaged: {validation_message(error)}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise BundleCorruptError(f"{path} is damaged ({shortened(error)}); export the bundle again") from error
    title = f"bundle {path}, {'float' if told.trial is None else f'trial {told.trial}'}"
    identity = told.identity or {"target": manifest["target"]["description"]}
    return Compared(title, "bundle", config, metrics, [layer.model_dump() for layer in told.layers], identity)


def _measurement(data: dict[str, Any]) -> Measurement:
    return TypeAdapter(Measurement).validate_python(asdict(measurement_from_json(data)))


def _metrics(measured: Measurement, baseline: Measurement, heldout: Mapping[str, Any] | None) -> dict[str, Any]:
    latency, accuracy = measured.latency, measured.accuracy
    return {
        "latency_ms": latency.median_ms,
        "latency_spread_ms": latency.spread_ms,
        "latency_source": latency.source,
        "noisy_timing": latency.noisy,
        "speedup": baseline.latency.median_ms / latency.median_ms,
        "peak_bytes": measured.memory.peak_bytes,
        "weight_bytes": measured.memory.weight_bytes,
        "metric": accuracy.metric,
        "top1": accuracy.top1,
        "top1_loss_pp": accuracy.top1_loss_pp,
        "top1_loss_ci_pp": list(accuracy.top1_loss_ci_pp),
        "images": accuracy.images,
        "heldout": None if heldout is None else dict(heldout),
    }


def _again(accuracy: Accuracy, latency: Latency) -> dict[str, Any]:
    return {
        "latency_ms": latency.median_ms,
        "latency_spread_ms": latency.spread_ms,
        "top1": accuracy.top1,
        "top1_loss_pp": accuracy.top1_loss_pp,
        "top1_loss_ci_pp": list(accuracy.top1_loss_ci_pp),
        "images": accuracy.images,
        "metric": accuracy.metric,
    }
