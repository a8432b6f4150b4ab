"""From recorded statistics to a new version of a bundle: drift, new scales, a trial of them, and the version."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qsearch.adapt.propose import Scales, proposed_scales
from qsearch.adapt.replay import Modules, rescaled_module
from qsearch.adapt.statistics import CallStatistics, read_statistics
from qsearch.adapt.validate import Trial, Verdict, try_scales
from qsearch.adapt.versions import new_record, read_bundle, replace_version, version_of, write_version
from qsearch.calibrate.drift import DriftReference
from qsearch.data import Preprocessing
from qsearch.data.dataset import decode_input, list_directory
from qsearch.errors import BundleError, DataError
from qsearch.export import runner
from qsearch.export.reference_counts import drift_reference
from qsearch.export.verify import read_bundle_classes, read_bundle_preprocessing

__all__ = ["Adaptation", "ValueDrift", "adapt_bundle", "apply_adaptation", "labelled_trial"]

NOTHING = "the module has no 8-bit values whose scales could be replaced"


@dataclass(frozen=True)
class ValueDrift:
    """What happened to a value, and what is proposed for it.

    Attributes:
        name: The layer or operation that writes it.
        index: Population stability index against the reference.
        threshold: Above which it has moved.
        moved: Whether it has.
        clipped: Share of what was counted that its range clips.
        range: (low, high) that its integers hold.
        proposed: The same with the scale that is proposed; None where it keeps its own.
        replaceable: Whether it can have another scale.
    """

    name: str
    index: float
    threshold: float
    moved: bool
    clipped: float
    range: tuple[float, float]
    proposed: tuple[float, float] | None
    replaceable: bool


@dataclass(frozen=True, eq=False)
class Adaptation:
    """What statistics say of a bundle.

    Attributes:
        bundle: The bundle.
        manifest: Its manifest.
        record: Its scales.
        statistics: What was recorded.
        values: Its values, most drifted first.
        scales: The proposed ones; None where nothing has moved.
        verdict: What these show on images; None where there are none.
        outputs: What the module with them gives for the recorded inputs.
    """

    bundle: Path
    manifest: dict[str, Any]
    record: dict[str, Any]
    statistics: CallStatistics
    values: list[ValueDrift]
    scales: Scales | None = None
    verdict: Verdict | None = None
    outputs: np.ndarray | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        facts = {"bundle": str(self.bundle), "version": version_of(self.manifest), "images": self.statistics.images}
        verdict = None if self.verdict is None else asdict(self.verdict)
        return facts | {"drifted": self.scales is not None, "values": [asdict(one) for one in self.values], "verdict": verdict}


def adapt_bundle(bundle: Path, statistics: Path, trial: Trial | None = None, trust: bool = False) -> Adaptation:
    """Compare statistics with the reference, propose scales and try them.

    Args:
        bundle: The bundle, which is left as it is.
        statistics: What its monitor has recorded.
        trial: Labelled images to try scales on; None for those that the monitor has kept.
        trust: Whether a bundle that this user has not made may be run.

    Raises:
        UntrustedError: It may not.
        BundleError: The bundle cannot be used.
        DataError: The statistics cannot be used.
    """
    manifest, record = read_bundle(bundle, trust)
    if not any(value["replaceable"] for value in record["values"]):
        raise BundleError(f"{bundle}: {NOTHING}")
    recorded = read_statistics(statistics, bundle, manifest, len(record["values"]))
    reference = drift_reference(record)
    index, thresholds = reference.index(recorded.counts), reference.thresholds(recorded.batches)
    moved = [number for number in range(len(index)) if index[number] > thresholds[number]]
    scales = proposed_scales(record, recorded.counts) if moved else None
    rows = [_drift(record, recorded, number, (index[number], thresholds[number]), scales) for number in range(len(index))]
    rows.sort(key=lambda row: -row.index)
    found = Adaptation(bundle, manifest, record, recorded, rows)
    if scales is None:
        return found
    given = Trial(recorded.kept, None, "recorded") if trial is None else trial
    verdict, outputs = try_scales(Modules(bundle, manifest, record), scales, recorded, given)
    return Adaptation(bundle, manifest, record, recorded, rows, scales, verdict, outputs)


def _drift(
    record: dict[str, Any], recorded: CallStatistics, number: int, found: tuple[float, float], scales: Scales | None
) -> ValueDrift:
    value, counts = record["values"][number], recorded.counts[number]
    before = _range(value["scale"], value["zero_point"])
    real = (np.arange(len(counts)) - value["wide_zero_point"]) * value["wide_scale"]
    # Half a step of the recording is not beyond the range.
    beyond = (real < before[0] - value["wide_scale"] / 2) | (real > before[1] + value["wide_scale"] / 2)
    clipped = float(counts[beyond].sum() / max(counts.sum(), 1))
    changed = scales is not None and scales[number] != (value["scale"], value["zero_point"])
    proposed = _range(*scales[number]) if scales is not None and changed else None
    index, threshold = map(float, found)
    return ValueDrift(value["name"], index, threshold, index > threshold, clipped, before, proposed, value["replaceable"])


def _range(scale: float, zero_point: int) -> tuple[float, float]:
    return -zero_point * scale, (255 - zero_point) * scale


def apply_adaptation(adaptation: Adaptation) -> dict[str, Any]:
    """Put a new version in a bundle's place; no compiler takes part.

    Returns:
        version, previous (where the old one is kept), seconds.

    Raises:
        BundleError: The scales were not accepted, or nothing can be written; the bundle is as it was.
    """
    start, found = time.perf_counter(), adaptation
    if found.scales is None or found.verdict is None or not found.verdict.accepted or found.outputs is None:
        raise BundleError(f"{found.bundle} is left as it is: {'nothing has moved' if found.scales is None else 'refused'}")
    old = drift_reference(found.record)
    # What was recorded is what is usual from now on.
    reference = DriftReference(found.statistics.counts, found.statistics.batches, old.noise, old.alarm)
    module = rescaled_module(found.bundle, found.record, found.scales)
    facts = {"verdict": asdict(found.verdict), "images": found.statistics.images}
    facts["values"] = [asdict(row) for row in found.values if row.proposed is not None]
    record = new_record(found.record, found.scales, reference)
    place = write_version(found.bundle, found.manifest, record, (module, found.outputs), facts)
    replace_version(found.bundle, place)
    version = version_of(runner.read_manifest(found.bundle))
    return {"version": version, "previous": str(place), "seconds": time.perf_counter() - start}


def labelled_trial(bundle: Path, folder: Path, convert_channels: bool = False) -> Trial:
    """Labelled images to try scales on.

    Args:
        bundle: A classifier's.
        folder: One folder per class, or `labels.csv`; all of its images are used.
        convert_channels: Convert grey images to colour, or the reverse, where the model needs it.

    Raises:
        DataError: They cannot be used.
        BundleError: The bundle cannot.
    """
    preprocessing: Preprocessing = read_bundle_preprocessing(bundle)
    if (bundle / runner.DETECTION).exists():
        raise DataError(f"{bundle} holds a detector: leave --data out, and its scales are tried on the recorded images")
    listing = list_directory(folder, read_bundle_classes(bundle) or None)
    images: np.ndarray = np.stack(
        [decode_input(listing, index, preprocessing, convert_channels) for index in range(len(listing.names))]
    )
    if runner.takes_pixels(runner.read_manifest(bundle)):
        images = preprocessing.pixels_of(images)
    return Trial(images, np.array(listing.labels.indices, np.int64), "labelled")
