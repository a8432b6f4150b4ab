"""What the tables say of a configuration, corrected by every trial that was measured.

Latency and divergence are sums over layers; their terms start from the tables and are moved by Bayesian linear
regression (Bishop 2006, "Pattern Recognition and Machine Learning", eq. 3.50, in its dual form, as there are fewer
trials than terms). What top-1 is lost is a power of the divergence, fitted over the trials. Of a trial that was stopped
early the divergence over its first images is known; over all of them it is as many times as large as it was in the
trials that saw all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from qsearch.search.tables.pairwise import PairwiseSum

__all__ = [
    "LossCurve",
    "Observation",
    "Score",
    "Surrogate",
    "correct_divergence",
    "correct_latency",
    "fit_loss_curve",
    "fit_surrogate",
]

# Relative standard deviations: of a table's term, of what all terms have in common, of a measurement, of one that is told
# from the first images.
LATENCY_TERM, LATENCY_SCALE, LATENCY_NOISE = 0.1, 0.3, 0.02
DIVERGENCE_TERM, DIVERGENCE_SCALE, DIVERGENCE_NOISE, PART_NOISE = 0.5, 0.5, 0.15, 0.35
# Candidates for the exponent of the loss, and before any trial: percentage points at one nat, with what they are worth.
EXPONENTS = (0.5, 0.7, 0.85, 1.0, 1.2)
PRIOR_PP, PRIOR_SD_PP = 25.0, 25.0
# Standard error of a paired difference over so many images whose answers rarely change, percentage points.
LEAST_SD_PP = 0.05


@dataclass(frozen=True)
class Score:
    """What a trial that saw all images lost.

    Attributes:
        divergence: Mean KL divergence from float, nats.
        loss_pp: Top-1 loss.
        loss_sd_pp: Its standard error.
        by_images: Number of images -> mean divergence over the first so many of the run, nats.
    """

    divergence: float
    loss_pp: float
    loss_sd_pp: float
    by_images: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Observation:
    """A measured trial.

    Attributes:
        assignment: int (layers,).
        setting: Which calibration, granularity and weight scale, as an index.
        latency_ms: Measured.
        score: None if the trial was stopped early.
        added_ms: What its setting adds to the latency that the table is about.
        part: Of a trial that was stopped early: number of images, and the mean divergence over them, nats.
    """

    assignment: np.ndarray
    setting: int
    latency_ms: float
    score: Score | None
    added_ms: float = 0.0
    part: tuple[int, float] | None = None


@dataclass(frozen=True)
class LossCurve:
    """Top-1 loss as a power of the divergence.

    Attributes:
        factor_pp: Percentage points at one nat.
        exponent: Of the divergence.
        sd_pp: Standard deviation of a measured loss around it.
    """

    factor_pp: float = PRIOR_PP
    exponent: float = 1.0
    sd_pp: float = 1.0

    def __call__(self, divergence: np.ndarray) -> np.ndarray:
        """Percentage points; float64, as many as divergences."""
        return np.minimum(self.factor_pp * np.maximum(divergence, 0.0) ** self.exponent, 100.0)


@dataclass(frozen=True)
class Surrogate:
    """Predictions of objectives.

    Attributes:
        latency: Milliseconds.
        divergences: Nats, one table per setting.
        curve: From nats to percentage points.
    """

    latency: PairwiseSum
    divergences: Sequence[PairwiseSum]
    curve: LossCurve


def fit_surrogate(latency: PairwiseSum, divergences: Sequence[PairwiseSum], observations: Sequence[Observation]) -> Surrogate:
    """The tables, corrected by all that was measured.

    Args:
        latency: The table, milliseconds.
        divergences: The tables, nats, one per setting.
        observations: Completed trials, and ones stopped early.
    """
    corrected = correct_divergence(divergences, observations)
    return Surrogate(correct_latency(latency, observations), corrected, fit_loss_curve(observations))


def correct_latency(table: PairwiseSum, observations: Sequence[Observation]) -> PairwiseSum:
    """The latency table moved towards what was measured, milliseconds."""
    if not observations:
        return table
    rows = np.stack([one.assignment for one in observations])
    measured = np.array([one.latency_ms - one.added_ms for one in observations])
    predicted = table(rows)
    # One change of scale for all terms, and one of every term of a layer.
    typical = abs(predicted).mean() / max(len(table.unary), 1)
    deviations = [LATENCY_SCALE, *(LATENCY_TERM * typical for _ in range(sum(table.sizes)))]
    design = np.concatenate([predicted[:, None], _one_hot(rows, table.sizes)], axis=1)
    shift = _posterior(design, measured - predicted, np.array(deviations), LATENCY_NOISE * measured)
    scale, terms = 1.0 + shift[0], np.split(shift[1:], np.cumsum(table.sizes)[:-1])
    unary = tuple(scale * own + moved for own, moved in zip(table.unary, terms, strict=True))
    return PairwiseSum(unary, {pair: scale * one for pair, one in table.pairs.items()}, scale * table.constant)


def correct_divergence(tables: Sequence[PairwiseSum], observations: Sequence[Observation]) -> list[PairwiseSum]:
    """The divergence tables, one per setting, moved towards what was measured, nats.

    A term's relative error is the same in every setting; a setting may be off by a factor as a whole.
    """
    found = [(one, *known) for one, known in zip(observations, _divergences(observations), strict=True) if known is not None]
    if not found:
        return list(tables)
    seen = [one for one, _, _ in found]
    sizes = tables[0].sizes
    rows = np.stack([one.assignment for one in seen])
    settings = np.array([one.setting for one in seen])
    measured, relative = np.array([known for _, *known in found]).T
    shares = np.stack([_unary_terms(tables[one.setting], one.assignment) for one in seen])
    predicted = np.array([tables[one.setting](one.assignment[None])[0] for one in seen])
    design = np.zeros((len(rows), sum(sizes) + len(tables)))
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    for n, row in enumerate(rows):
        design[n, starts + row] = shares[n]
        design[n, sum(sizes) + settings[n]] = predicted[n]
    deviations = np.array([DIVERGENCE_TERM] * sum(sizes) + [DIVERGENCE_SCALE] * len(tables))
    noise = relative * np.maximum(measured, predicted) + 1e-9
    shift = _posterior(design, measured - predicted, deviations, noise)
    factors = np.split(np.clip(1.0 + shift[: sum(sizes)], 0.1, 10.0), np.cumsum(sizes)[:-1])
    corrected = []
    for table, whole in zip(tables, np.clip(1.0 + shift[sum(sizes) :], 0.1, 10.0), strict=True):
        unary = tuple(whole * own * factor for own, factor in zip(table.unary, factors, strict=True))
        corrected.append(replace(table, unary=unary, pairs={pair: whole * one for pair, one in table.pairs.items()}))
    return corrected


def _divergences(observations: Sequence[Observation]) -> list[tuple[float, float] | None]:
    """Each trial's divergence over all images, nats, and its relative standard deviation; None where nothing is known."""
    whole: dict[int, list[float]] = {}
    for one in observations:
        if one.score is not None:
            for images, nats in one.score.by_images.items():
                whole.setdefault(images, []).append(one.score.divergence / max(nats, 1e-12))
    found: list[tuple[float, float] | None] = []
    for one in observations:
        if one.score is not None:
            found.append((one.score.divergence, DIVERGENCE_NOISE))
        elif one.part is not None and one.part[0] in whole:
            images, nats = one.part
            found.append((nats * float(np.median(whole[images])), PART_NOISE))
        else:
            found.append(None)
    return found


def fit_loss_curve(observations: Sequence[Observation]) -> LossCurve:
    """Fit the curve by weighted least squares; far losses count by their relative error."""
    seen = [one.score for one in observations if one.score is not None and one.score.divergence > 0]
    if not seen:
        return LossCurve()
    divergence = np.array([one.divergence for one in seen])
    loss = np.array([one.loss_pp for one in seen])
    weight = 1.0 / (np.array([max(one.loss_sd_pp, LEAST_SD_PP) for one in seen]) ** 2 + (0.2 * loss) ** 2)
    best, least = LossCurve(), np.inf
    for exponent in EXPONENTS:
        basis = divergence**exponent
        factor = ((weight * basis * loss).sum() + PRIOR_PP / PRIOR_SD_PP**2) / ((weight * basis**2).sum() + 1 / PRIOR_SD_PP**2)
        factor = max(float(factor), 1e-3)
        error = float((weight * (loss - factor * basis) ** 2).sum())
        if error < least:
            best, least = LossCurve(factor, exponent), error
    return replace(best, sd_pp=float(np.median([max(one.loss_sd_pp, LEAST_SD_PP) for one in seen])))


def _one_hot(rows: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    return np.concatenate([np.eye(size)[rows[:, i]] for i, size in enumerate(sizes)], axis=1)


def _unary_terms(table: PairwiseSum, row: np.ndarray) -> np.ndarray:
    """A row's own terms, float64 (layers,)."""
    return np.array([term[value] for term, value in zip(table.unary, row, strict=True)])


def _posterior(design: np.ndarray, residual: np.ndarray, deviations: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Mean of weights with prior N(0, deviations ** 2), given residual = design @ weights + N(0, noise ** 2)."""
    spread = design * deviations**2
    return spread.T @ np.linalg.solve(spread @ design.T + np.diag(noise**2), residual)
