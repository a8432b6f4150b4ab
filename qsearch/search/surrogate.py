"""What the tables say of a configuration, corrected by every trial that was measured.

Latency and divergence are sums over layers; their terms start from the tables and are moved by Bayesian linear
regression (Bishop 2006, "Pattern Recognition and Machine Learning", eq. 3.50, in its dual form, as there are fewer
trials than terms). What top-1 is lost is a power of the divergence, fitted over the trials. Of a trial that was stopped
early the divergence is known less well, see `qsearch.measure.image_blocks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qsearch.search.tables.pairwise import PairwiseSum, each_in

__all__ = [
    "DivergenceError",
    "LossCurve",
    "Observation",
    "Score",
    "Surrogate",
    "correct_divergence",
    "correct_latency",
    "fit_loss_curve",
    "fit_surrogate",
    "one_hot",
]

# Relative standard deviations: of a table's term, of what all terms have in common, of what those of a setting have in common
# beside that, of what is beside them, which counts for nothing before trials show it, of a measurement, of one that is told from
# some of the images.
LATENCY_TERM, LATENCY_SCALE, LATENCY_SETTING, LATENCY_BESIDE, LATENCY_NOISE = 0.05, 0.3, 0.05, 1.0, 0.02
# Standard deviation of the power with which a ratio to float's time goes when the machine becomes slower, float more than others.
LATENCY_SLOWDOWN = 0.1
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
        divergence: Mean KL divergence from float, nats; None in records of older versions.
        loss_pp: Top-1 loss.
        loss_sd_pp: Its standard error.
    """

    divergence: float | None
    loss_pp: float
    loss_sd_pp: float


@dataclass(frozen=True)
class Observation:
    """A measured trial.

    Attributes:
        assignment: int (layers,).
        setting: Which calibration, granularity and weight scale, as an index.
        latency_ms: Measured.
        peak_bytes: Measured.
        score: None if the trial was stopped early.
        estimate: Of a trial that was stopped early: its divergence as the images that it saw tell it, nats, if they do.
        beside_ms: What its kernels take beside the sum over its layers, by the times of kernels.
        slowdown: How much slower the machine was while it was timed, see `Latency.slowdown`.
    """

    assignment: np.ndarray
    setting: int
    latency_ms: float
    peak_bytes: int
    score: Score | None
    estimate: float | None = None
    beside_ms: float = 0.0
    slowdown: float = 1.0


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

    def sd(self, divergence: np.ndarray, error: np.ndarray) -> np.ndarray:
        """Standard deviation of a loss that will be measured, percentage points, float64 (N,).

        Args:
            divergence: Predicted, float64 (N,), nats.
            error: Its standard deviation, float64 (N,), nats.
        """
        loss = self(divergence)
        # Where little is lost few answers change, and luck has little to change.
        luck = self.sd_pp * np.sqrt(loss / (loss + self.sd_pp))
        return np.hypot(luck, self(divergence + error) - loss)


@dataclass(frozen=True)
class Surrogate:
    """Predictions of objectives.

    Attributes:
        latencies: Milliseconds, one table per setting.
        beside: What share of what is beside those sums by the times of kernels, as of conversions, shows in trials.
        slowdown: With what power of the machine's slowdown a latency goes, told on float's clock.
        divergences: Nats, one table per setting.
        error: How far they may be off.
        curve: From nats to percentage points.
    """

    latencies: Sequence[PairwiseSum]
    beside: float
    slowdown: float
    divergences: Sequence[PairwiseSum]
    error: DivergenceError
    curve: LossCurve

    def latency_ms(self, rows: np.ndarray, settings: np.ndarray, beside_ms: np.ndarray) -> np.ndarray:
        """Milliseconds, float64 (N,), of assignments int (N, layers) in settings int (N,); beside_ms as of `Observation`."""
        return each_in(self.latencies, rows, settings) + self.beside * beside_ms

    def believed_ms(self, trials: Sequence[Observation]) -> np.ndarray:
        """Latencies of one trial or more, float64 (N,): the mean of what was measured and what is predicted.

        The least of many timings is a lucky one, and beside it a better candidate would seem to add nothing (Forrester, Keane
        and Bressloff 2006, "Design and analysis of 'noisy' computer experiments").
        """
        rows, settings = np.stack([one.assignment for one in trials]), np.array([one.setting for one in trials])
        predicted = self.latency_ms(rows, settings, np.array([one.beside_ms for one in trials]))
        measured = np.array([one.latency_ms / one.slowdown**self.slowdown for one in trials])
        return (measured + predicted) / 2


def fit_surrogate(
    latencies: Sequence[PairwiseSum],
    divergences: Sequence[PairwiseSum],
    observations: Sequence[Observation],
    storages: Sequence[int],
) -> Surrogate:
    """The tables, corrected by all that was measured.

    Args:
        latencies: The tables, milliseconds, one per setting.
        divergences: The tables, nats, one per setting.
        observations: Completed trials, and ones stopped early.
        storages: Of every setting the first one that runs the same kernels.
    """
    corrected, error = correct_divergence(divergences, observations)
    moved, beside, slowdown = correct_latency(latencies, observations, storages)
    return Surrogate(moved, beside, slowdown, corrected, error, fit_loss_curve(observations))


def correct_latency(
    tables: Sequence[PairwiseSum], observations: Sequence[Observation], storages: Sequence[int]
) -> tuple[list[PairwiseSum], float, float]:
    """The latency tables, one per setting, moved towards what was measured, milliseconds; `Surrogate.beside`; and its `slowdown`.

    A term is off by the same in every setting; all may be off by a factor, and those with the same kernels by another one.
    """
    if not observations:
        return list(tables), 0.0, 0.0
    sizes, kinds = tables[0].sizes, list(dict.fromkeys(storages))
    rows = np.stack([one.assignment for one in observations])
    settings = np.array([one.setting for one in observations])
    measured = np.array([one.latency_ms for one in observations])
    beside = np.array([one.beside_ms for one in observations])
    predicted = each_in(tables, rows, settings)
    kind = np.array([kinds.index(storage) for storage in storages])
    of_kinds = predicted[:, None] * np.eye(len(kinds))[kind[settings]]
    slower = predicted * np.log([one.slowdown for one in observations])
    design = np.column_stack([beside, slower, predicted, of_kinds, one_hot(rows, sizes)])
    term = LATENCY_TERM * abs(predicted).mean() / max(len(sizes), 1)
    common = [LATENCY_BESIDE, LATENCY_SLOWDOWN, LATENCY_SCALE]
    deviations = np.array([*common, *[LATENCY_SETTING] * len(kinds), *[term] * sum(sizes)])
    shift = _posterior(design, measured - predicted, deviations, LATENCY_NOISE * measured)
    (share, power, whole), of_kind, of_terms = np.split(shift, [3, 3 + len(kinds)])
    terms = PairwiseSum(tuple(np.split(of_terms, np.cumsum(sizes)[:-1])), {})
    factors = (1.0 + whole + of_kind)[kind].tolist()
    moved = [table.scaled(factor).plus(terms) for table, factor in zip(tables, factors, strict=True)]
    return moved, float(share), float(power)


@dataclass(frozen=True)
class DivergenceError:
    """How far corrected divergences may be off: their standard deviation given the trials (Bishop 2006, eq. 3.59).

    Attributes:
        tables: The tables before their correction, nats, one per setting.
        design: The trials' features, float64 (trials, features).
        covariance: Of the trials' divergences, their noise included, float64 (trials, trials).
    """

    tables: Sequence[PairwiseSum]
    design: np.ndarray
    covariance: np.ndarray

    def __call__(self, rows: np.ndarray, settings: np.ndarray) -> np.ndarray:
        """Nats, float64 (N,), of assignments int (N, layers) in settings int (N,)."""
        features = _features(self.tables, rows, settings)
        spread = features * _deviations(self.tables)
        shared = spread @ (self.design * _deviations(self.tables)).T
        known = (shared * np.linalg.solve(self.covariance, shared.T).T).sum(1) if len(self.design) else 0.0
        # Layers do not quite add up: what a trial is off by, the next configuration will be off by as well.
        misfit = DIVERGENCE_NOISE * features[:, sum(self.tables[0].sizes) :].sum(1)
        return np.sqrt(np.maximum((spread**2).sum(1) - known, 0.0) + misfit**2)


def correct_divergence(
    tables: Sequence[PairwiseSum], observations: Sequence[Observation]
) -> tuple[list[PairwiseSum], DivergenceError]:
    """The divergence tables, one per setting, moved towards what was measured, nats; and how far they may still be off.

    A term's relative error is the same in every setting; a setting may be off by a factor as a whole.
    """
    found = [(one, *known) for one, known in zip(observations, _divergences(observations), strict=True) if known is not None]
    sizes = tables[0].sizes
    if not found:
        return list(tables), DivergenceError(tables, np.zeros((0, sum(sizes) + len(tables))), np.zeros((0, 0)))
    rows = np.stack([one.assignment for one, _, _ in found])
    settings = np.array([one.setting for one, _, _ in found])
    measured, relative = np.array([known for _, *known in found]).T
    design = _features(tables, rows, settings)
    predicted = design[:, sum(sizes) :].sum(1)
    noise = relative * np.maximum(measured, predicted) + 1e-9
    spread = design * _deviations(tables)
    covariance = spread @ spread.T + np.diag(noise**2)
    shift = _deviations(tables) * (spread.T @ np.linalg.solve(covariance, measured - predicted))
    factors = np.split(np.clip(1.0 + shift[: sum(sizes)], 0.1, 10.0), np.cumsum(sizes)[:-1])
    corrected = []
    for table, whole in zip(tables, np.clip(1.0 + shift[sum(sizes) :], 0.1, 10.0), strict=True):
        unary = tuple(whole * own * factor for own, factor in zip(table.unary, factors, strict=True))
        corrected.append(replace(table, unary=unary, pairs={pair: whole * one for pair, one in table.pairs.items()}))
    return corrected, DivergenceError(tables, design, covariance)


def _features(tables: Sequence[PairwiseSum], rows: np.ndarray, settings: np.ndarray) -> np.ndarray:
    """What relative errors multiply: a row's own terms at its values, and its sum at its setting; float64 (N, features)."""
    sizes = tables[0].sizes
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    found = np.zeros((len(rows), sum(sizes) + len(tables)))
    for setting in set(settings.tolist()):
        here, table = np.flatnonzero(settings == setting), tables[setting]
        for layer, term in enumerate(table.unary):
            found[here, starts[layer] + rows[here, layer]] = term[rows[here, layer]]
        found[here, sum(sizes) + setting] = table(rows[here])
    return found


def _deviations(tables: Sequence[PairwiseSum]) -> np.ndarray:
    return np.array([DIVERGENCE_TERM] * sum(tables[0].sizes) + [DIVERGENCE_SCALE] * len(tables))


def _divergences(observations: Sequence[Observation]) -> list[tuple[float, float] | None]:
    """Each trial's divergence over all images, nats, and its relative standard deviation; None where nothing is known."""
    told = [(one.estimate, PART_NOISE) if one.score is None else (one.score.divergence, DIVERGENCE_NOISE) for one in observations]
    return [None if divergence is None else (divergence, noise) for divergence, noise in told]


def fit_loss_curve(observations: Sequence[Observation]) -> LossCurve:
    """Fit the curve by weighted least squares; far losses count by their relative error."""
    seen = [one.score for one in observations if one.score is not None and (one.score.divergence or 0.0) > 0.0]
    if not seen:
        return LossCurve()
    divergence = np.array([one.divergence for one in seen], np.float64)
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


def one_hot(rows: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Assignments, int (N, layers), as float64 (N, sum of sizes): one where a layer has a value."""
    return np.concatenate([np.eye(size)[rows[:, i]] for i, size in enumerate(sizes)], axis=1)


def _posterior(design: np.ndarray, residual: np.ndarray, deviations: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Mean of weights with prior N(0, deviations ** 2), given residual = design @ weights + N(0, noise ** 2)."""
    spread = design * deviations**2
    return spread.T @ np.linalg.solve(spread @ design.T + np.diag(noise**2), residual)
