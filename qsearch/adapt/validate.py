"""Try new scales on images before they are believed.

There is no float model in a bundle. What stands in for it is the mean output of several modules with the same weights
whose ranges reach beyond everything that was recorded, so that they clip nothing, and whose scales differ, so that their
rounding errors differ and their mean has less of them. New scales are accepted if they bring the outputs closer to it,
surely, and where there are labels, if they get no fewer images right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qsearch.adapt.propose import Scales, covered_steps
from qsearch.adapt.replay import Modules
from qsearch.adapt.statistics import CallStatistics
from qsearch.measure.accuracy import divergences, paired_interval
from qsearch.quantize.affine import affine_from_range

__all__ = ["LEAST_IMAGES", "Trial", "Verdict", "reference_scales", "try_scales"]

# Widths of the reference modules' ranges, relative to what was recorded.
REFERENCE_WIDTHS = (1.0, 1.06, 1.12, 1.18, 1.24, 1.3, 1.36, 1.42)
# Fewer images than these decide nothing.
LEAST_IMAGES = 16
Z95 = 1.959963984540054


@dataclass(frozen=True, eq=False)
class Trial:
    """Images to try scales on.

    Attributes:
        images: As the module takes them.
        labels: Class indices, int64 (N,); None where they are not known.
        source: 'recorded' or 'labelled'.
    """

    images: np.ndarray
    labels: np.ndarray | None
    source: str


@dataclass(frozen=True)
class Verdict:
    """What new scales show on images.

    Attributes:
        accepted: Whether they are better.
        reason: Why, or why not.
        images: Images tried.
        source: Where these came from.
        divergence_before: Mean distance of the outputs from the reference, with the old scales.
        divergence_after: With the new ones.
        gain_ci: 95 % interval of the mean difference.
        right_before: Images right with the old scales; None without labels.
        right_after: With the new ones.
        top1_gain_ci_pp: 95 % interval of what they gain, percentage points.
    """

    accepted: bool
    reason: str
    images: int
    source: str
    divergence_before: float = 0.0
    divergence_after: float = 0.0
    gain_ci: tuple[float, float] = (0.0, 0.0)
    right_before: int | None = None
    right_after: int | None = None
    top1_gain_ci_pp: tuple[float, float] | None = None


def reference_scales(record: dict[str, Any], statistics: CallStatistics) -> list[Scales]:
    """Scales of the modules whose mean is the reference."""
    variants = []
    for width in REFERENCE_WIDTHS:
        scales: Scales = [(value["scale"], value["zero_point"]) for value in record["values"]]
        for number, value in enumerate(record["values"]):
            least, most = covered_steps(statistics.counts[number], value["wide_zero_point"])
            if value["replaceable"] and most > least:
                step = value["wide_scale"] * width
                affine = affine_from_range(value["name"], float(least * step), float(most * step))
                scales[number] = float(affine.scale), affine.zero_point
        variants.append(scales)
    return variants


def try_scales(modules: Modules, scales: Scales, statistics: CallStatistics, trial: Trial) -> tuple[Verdict, np.ndarray]:
    """Run the old scales, the new ones and the reference.

    Args:
        modules: Runs modules of the bundle with other scales.
        scales: The new ones.
        statistics: What they were made from.
        trial: Images to decide on.

    Returns:
        The verdict, and what the new module gives for the bundle's recorded inputs.

    Raises:
        BundleError: The modules cannot be run.
    """
    record, recorded = modules.record, modules.recorded_inputs()
    decisive = len(trial.images) >= LEAST_IMAGES
    given = np.concatenate([trial.images, recorded]) if decisive else recorded
    wanted = [None, scales, *reference_scales(record, statistics)] if decisive else [None, scales]
    outputs = modules.outputs(wanted, given)
    kept, count = outputs[1, len(given) - len(recorded) :], len(trial.images)
    if not decisive:
        way_out = "give --data DIR with labelled images, or record longer, with keep"
        reason = f"there are {count} images to try new scales on, and fewer than {LEAST_IMAGES} decide nothing: {way_out}"
        return Verdict(False, reason, count, trial.source), kept
    return _judged(outputs[:, :count], trial), kept


def _judged(outputs: np.ndarray, trial: Trial) -> Verdict:
    """Compare the first two of several modules' outputs (modules, N, ...) with the mean of the others."""
    before, after = (_distances(outputs[2:], one) for one in outputs[:2])
    gain, count = before - after, len(before)
    half = Z95 * float(gain.std(ddof=1)) / np.sqrt(count)
    interval = float(gain.mean()) - half, float(gain.mean()) + half
    facts: dict[str, Any] = {"images": count, "source": trial.source, "gain_ci": interval}
    facts |= {"divergence_before": float(before.mean()), "divergence_after": float(after.mean())}
    lost = 0
    if trial.labels is not None:
        old, new = (_classes(one) == trial.labels for one in outputs[:2])
        lost, gained = int((old & ~new).sum()), int((new & ~old).sum())
        facts |= {"right_before": int(old.sum()), "right_after": int(new.sum())}
        facts["top1_gain_ci_pp"] = paired_interval(gained, lost, count)
        lost -= gained
    if lost > 0:
        return Verdict(False, f"the new scales get {lost} images fewer right", **facts)
    if interval[0] <= 0:
        return Verdict(
            False, "the new scales bring the outputs no closer to what the module gives when nothing is clipped", **facts
        )
    return Verdict(True, "the new scales bring the outputs closer to what the module gives when nothing is clipped", **facts)


def _classes(outputs: np.ndarray) -> np.ndarray:
    """Classes that a module chooses, (N,)."""
    return outputs if outputs.ndim == 1 else outputs.argmax(1)


def _distances(references: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """How far outputs are from the mean of references, per image.

    Kullback-Leibler divergence of class probabilities in nats; of classes alone the share of references that disagree;
    of anything else, a detector's grid, the mean square relative to the references'.
    """
    if outputs.ndim == 1:
        return np.asarray((references != outputs).mean(0))
    mean = references.mean(0, dtype=np.float64)
    if outputs.ndim == 2:
        return divergences(mean, outputs)
    axes = tuple(range(1, outputs.ndim))
    return np.asarray(np.square(outputs - mean).mean(axes) / max(float(np.square(mean).mean()), 1e-30))
