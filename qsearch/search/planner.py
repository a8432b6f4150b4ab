"""The planner: proposes the configuration from which it expects the most hypervolume.

Candidates are the exact minima of many weightings of latency, bytes and divergence over the corrected tables
(Lagrangian relaxation: the supported part of the predicted front) and small changes of measured front members (the
rest of it). Of these the one with the largest expected gain in hypervolume over the measured front is proposed, the
noise of a measured loss taken into account (Emmerich, Giannakoglou and Naujoks 2006, "Single- and multiobjective
evolutionary optimization assisted by Gaussian random field metamodels").

What a study begins with before there are tables is chosen in `opening`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import moocore
import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from qsearch.config import QuantConfig
from qsearch.measure.measurement import Latency
from qsearch.search.bound_space import PERCENTILE_TAIL, BoundSpace
from qsearch.search.constraints import Constraints
from qsearch.search.front import measurement_from_json
from qsearch.search.proposals import unseen_values
from qsearch.search.study import LOSS_BOUND_PP
from qsearch.search.study_trials import finished
from qsearch.search.surrogate import Observation, Score, Surrogate, fit_surrogate, one_hot
from qsearch.search.tables.cost import Cost
from qsearch.search.tables.layer_tables import Tables
from qsearch.search.tables.pairwise import each_in, minimize
from qsearch.search.tables.settings import assignment_config, assignment_values, lowest, measured_settings
from qsearch.search.wanted import Wanted, float_scale

__all__ = ["PlannerSampler", "drafted_trials", "tried_configs"]

# Trials of a study that are planned over the draft of its tables, opening included, at most.
DRAFTED = 24
# Divergences of single layers that are measured in about the time of a trial.
ROWS = 100
# Modules of trials that are timed kernel by kernel, at most.
TRIED = 24

# Weightings per proposal, and how far they reach around equal shares: factors of ten.
WEIGHTINGS, REACH = 128, 2.0
# Settings whose fronts are computed for a proposal; changed front members; candidates whose cost is computed exactly.
SETTINGS, CHANGES, SHORTLIST = 3, 128, 12
# Mixtures whose memory is planned before the first proposal.
MIXTURES = 24
# A configuration: the values of its layers, int (layers,), and which setting is nearest to its own.
Placed = tuple[np.ndarray, int]


def drafted_trials(space: BoundSpace) -> int:
    """How many trials of a study are planned over the draft of its tables, its opening included.

    The longer tables take, beside a trial, the later they are worth it: the first trials do with what there is soon.
    """
    rows = len(measured_settings(space)) * sum(len(layer.values) - 1 for layer in space.layers)
    return min(DRAFTED, rows // ROWS)


def tried_configs(study: optuna.Study) -> list[QuantConfig]:
    """Configurations whose modules tell what kernels take beside those of other precisions: first the front's, then the latest.

    Uniform networks have no conversions, and kernels of layers are faster in them.
    """
    trials = _completed(study)[::-1]
    on_front = moocore.is_nondominated(np.array([one.values for one in trials], np.float64)) if trials else []
    ordered = sorted(zip(on_front, trials, strict=True), key=lambda pair: not pair[0])
    return [QuantConfig.model_validate(one.user_attrs["config"]) for _, one in ordered[:TRIED]]


class PlannerSampler(optuna.samplers.BaseSampler):
    """An Optuna sampler that plans over measured tables.

    Args:
        space: The search space.
        tables: Of the same model and target.
        seed: Of the weightings and changes.
        constraints: Limits of the front that is wanted.
    """

    def __init__(self, space: BoundSpace, tables: Tables, seed: int, constraints: Constraints = Constraints()) -> None:
        self.space, self.tables = space, tables
        self.rng = np.random.default_rng(seed)
        self.fallback = optuna.samplers.RandomSampler(seed=seed)
        self.settings = [one.values for one in tables.settings]
        self.divergences = [tables.divergence(assignment_config(space, one, lowest(space))) for one in self.settings]
        self.scale = float_scale(tables.baseline)
        self.wanted = Wanted.within(constraints.limits, self.scale)
        self.storages = tables.storages
        self.costs: dict[tuple[bytes, int], Cost] = {}
        self.planned: list[np.ndarray] = []
        self.beside: list[tuple[float, float]] = []
        # What finished trials tell does not change: (number, content hash) -> it.
        self.told: dict[tuple[int, str], Observation] = {}
        sizes = np.array(tables.latency.sizes)
        for share in np.linspace(0.0, 1.0, MIXTURES):
            # From all layers in their first precision to all in their last.
            self._cost(np.where(self.rng.random(len(sizes)) < share, sizes - 1, 0), 0)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters at once."""
        return self.space.distributions()

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Values for all parameters."""
        known = {one.user_attrs["config_hash"] for one in study.get_trials(deepcopy=False) if "config_hash" in one.user_attrs}
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        pending = [self._placed(one) for one in running if one.number != trial.number and "config" in one.user_attrs]
        values = self.propose(self.observations(study), known, pending)
        return {name: value for name, value in values.items() if name in search_space}

    def observations(self, study: optuna.Study) -> list[Observation]:
        """What is known of the completed trials of a study and of those stopped early."""
        stopped = [one for one in finished(study, TrialState.PRUNED) if "bound" in one.user_attrs]
        trials = {(one.number, one.user_attrs["config_hash"]): one for one in (*_completed(study), *stopped)}
        self.told |= {key: self._observe(one) for key, one in trials.items() if key not in self.told}
        return [self.told[key] for key in trials]

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A parameter that the plan does not cover."""
        return self.fallback.sample_independent(study, trial, param_name, param_distribution)

    def propose(self, observations: Sequence[Observation], known: set[str], pending: Sequence[Placed] = ()) -> dict[str, Any]:
        """The candidate with the most expected hypervolume.

        Args:
            observations: Measured trials.
            known: Content hashes of configurations that need not be proposed again.
            pending: Those being measured. They are believed to bring what is predicted of them, so that a second proposal
                looks elsewhere (Ginsbourger, Le Riche and Carraro 2010, "Kriging is well-suited to parallelize optimization").
        """
        model = fit_surrogate(self.tables.latencies, self.divergences, observations, self.storages)
        front = self._front(model, observations, pending)
        rows, settings, nats = self._candidates(model, observations)
        ms, held = self._beside(rows).T
        weights = each_in(self.tables.weights, rows, settings)
        rough = np.stack([model.latency_ms(rows, settings, ms), weights + held, model.curve(nats)], 1)
        loss_sd = model.curve.sd(nats, model.error(rows, settings)) / LOSS_BOUND_PP
        best: tuple[tuple[float, ...], dict[str, Any]] | None = None
        tried = 0
        order = self.wanted.order(rough / self.scale, loss_sd, front)
        for k in order:
            values = self._values(rows[k], int(settings[k]))
            if self.space.config(values).content_hash() in known:
                continue
            exact = self._predicted(model, (rows[k], int(settings[k])), rough[k, 2])
            merit = tuple(self.wanted.merits(exact, loss_sd[k : k + 1], front)[0].tolist())
            if best is None or merit > best[0]:
                best = merit, values
            tried += 1
            if tried == SHORTLIST:
                break
        if best is not None:
            return best[1]
        # Nothing new among the candidates: a neighbour of the best of them. The driver ends a search that has none left.
        nearest = self._values(rows[order[0]], int(settings[order[0]]))
        return unseen_values(self.space, nearest, known, self.rng) or nearest

    def _candidates(self, model: Surrogate, observations: Sequence[Observation]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Assignments with the setting of the least predicted divergence that is new, once for every way of holding weights.

        Returns:
            Assignments int64 (N, layers), settings int64 (N,), nats float64 (N,).
        """
        divergences = model.divergences
        sizes = np.array(divergences[0].sizes)
        middle = np.stack([self.rng.integers(sizes) for _ in range(8)])
        order = np.argsort([table(middle).mean() for table in divergences])
        some = {int(order[0]), *(int(s) for s in self.rng.permutation(order)[: SETTINGS - 1])}
        worst = max(float(divergences[int(order[0])](np.array([sizes - 1]))[0]), 1e-12)
        weights = 10.0 ** self.rng.uniform(-REACH, REACH, (WEIGHTINGS, 2)) / self.scale[:2]
        weights = np.concatenate([weights, np.full((WEIGHTINGS, 1), 1.0 / worst)], 1)
        rows = [row for s in some for row in minimize([model.latencies[s], self.tables.weights[s], divergences[s]], weights)]
        rows += self._changes(model, observations, sizes)
        unique = np.unique(np.stack(rows), axis=0)
        nats = np.stack([table(unique) for table in divergences])
        # What has been measured in its best setting may have more luck in the next.
        fresh, place_of = nats.copy(), {row.tobytes(): place for place, row in enumerate(unique)}
        for one in observations:
            if (place := place_of.get(one.assignment.tobytes())) is not None:
                fresh[one.setting, place] = np.inf
        groups = [np.flatnonzero(np.array(self.storages) == storage) for storage in dict.fromkeys(self.storages)]
        chosen = np.concatenate([group[fresh[group].argmin(0)] for group in groups])
        places = np.tile(np.arange(len(unique)), len(groups))
        return unique[places], chosen, nats[chosen, places]

    def _changes(self, model: Surrogate, observations: Sequence[Observation], sizes: np.ndarray) -> list[np.ndarray]:
        """Measured front members with one or two layers changed."""
        scored = [one for one in observations if one.score is not None]
        if not scored:
            return []
        members = [scored[int(i)].assignment for i in np.flatnonzero(moocore.is_nondominated(_believed(model, scored)))]
        free = np.flatnonzero(sizes > 1)
        changed = []
        for _ in range(CHANGES if len(free) else 0):
            row = members[self.rng.integers(len(members))].copy()
            for i in self.rng.permutation(free)[: self.rng.integers(1, 3)]:
                row[i] = (row[i] + self.rng.integers(1, sizes[i])) % sizes[i]
            changed.append(row)
        return changed

    def _front(self, model: Surrogate, observations: Sequence[Observation], pending: Sequence[Placed]) -> np.ndarray:
        """What is measured and what will be, within limits and reference, over the float module's, float64 (N, 3)."""
        scored = [one for one in observations if one.score is not None]
        front = _believed(model, scored) / self.scale
        # A limit is kept by what was measured.
        timed = front.copy()
        timed[:, 0] = [one.latency_ms / self.scale[0] for one in scored]
        front = front[(timed <= self.wanted.limits).all(1)]
        losses = [float(model.curve(model.divergences[setting](row[None]))[0]) for row, setting in pending]
        awaited = [self._predicted(model, one, loss_pp) for one, loss_pp in zip(pending, losses, strict=True)]
        awaited = [one for one in awaited if (one <= self.wanted.limits).all()]
        front = np.clip(np.concatenate([front, *awaited]), 0.0, None)
        return front[(front < self.wanted.reference).all(1)]

    def _predicted(self, model: Surrogate, placed: Placed, loss_pp: float) -> np.ndarray:
        """Objectives of one configuration at its exact cost, over the float module's, float64 (1, 3)."""
        row, setting = placed
        (latency_ms,) = model.latency_ms(row[None], np.array([setting]), np.array([self._beside_ms(row, setting)]))
        return np.array([[latency_ms, self._cost(row, setting).peak_bytes, loss_pp]]) / self.scale

    def _placed(self, trial: FrozenTrial) -> Placed:
        config = QuantConfig.model_validate(trial.user_attrs["config"])
        row = np.array([one.values.index(config.precision[one.name]) for one in self.space.layers])
        return row, min(range(len(self.settings)), key=lambda i: _distance(self.settings[i], trial.params))

    def _observe(self, trial: FrozenTrial) -> Observation:
        row, setting = self._placed(trial)
        beside_ms = self._beside_ms(row, setting)
        if trial.state == TrialState.PRUNED:
            bound, peak_bytes = trial.user_attrs["bound"], trial.user_attrs["peak_bytes"]
            latency, estimate = Latency(**bound["latency"]), bound.get("divergence")
            return Observation(row, setting, latency.median_ms, peak_bytes, None, estimate, beside_ms, latency.slowdown)
        measured = measurement_from_json(trial.user_attrs["measurement"])
        scored = measured.accuracy
        low, high = scored.top1_loss_ci_pp
        # The interval reaches two standard errors either way.
        score = Score(scored.divergence, scored.top1_loss_pp, (high - low) / 4)
        latency, peak_bytes = measured.latency, measured.memory.peak_bytes
        return Observation(row, setting, latency.median_ms, peak_bytes, score, None, beside_ms, latency.slowdown)

    def _cost(self, row: np.ndarray, setting: int) -> Cost:
        """Exact cost of an assignment, in one setting for all that hold weights alike."""
        setting = self.storages[setting]
        key = row.tobytes(), setting
        if key not in self.costs:
            self.costs[key] = found = self.tables.cost(self.space.config(self._values(row, setting)))
            # A row of its own: a view would keep all candidates of its proposal.
            self.planned.append(row.copy())
            held = float(found.peak_bytes - self.tables.weights[setting](row[None])[0])
            self.beside.append((self._beside_ms(row, setting), held))
        return self.costs[key]

    def _beside_ms(self, row: np.ndarray, setting: int) -> float:
        """What an assignment's kernels take beside the sum over its layers."""
        return float(self._cost(row, setting).latency_ms - self.tables.latencies[setting](row[None])[0])

    def _beside(self, rows: np.ndarray) -> np.ndarray:
        """Milliseconds and bytes beside sums over layers, float64 (N, 2): those of the most similar assignment that was planned.

        Neither is a sum over layers, and to plan kernels and memory takes too long for every candidate.
        """
        sizes = self.tables.latency.sizes
        distinct, places = np.unique(rows, axis=0, return_inverse=True)
        # Layers that two assignments have in common.
        common = one_hot(distinct, sizes) @ one_hot(np.stack(self.planned), sizes).T
        return np.array(self.beside)[common.argmax(1)][places]

    def _values(self, row: np.ndarray, setting: int) -> dict[str, Any]:
        return assignment_values(self.space, self.settings[setting], row)


def _believed(model: Surrogate, scored: Sequence[Observation]) -> np.ndarray:
    """Objectives of trials that saw all images, float64 (N, 3): milliseconds, as `Surrogate.believed_ms`, bytes, points."""
    if not scored:
        return np.zeros((0, 3))
    held, lost = zip(*[(one.peak_bytes, one.score.loss_pp) for one in scored if one.score is not None], strict=True)
    return np.stack([model.believed_ms(scored), np.array(held, np.float64), np.array(lost)], 1)


def _completed(study: optuna.Study) -> list[FrozenTrial]:
    return [one for one in finished(study) if "measurement" in one.user_attrs]


def _distance(setting: Mapping[str, Any], values: Mapping[str, Any]) -> float:
    """How far a trial's parameters are from a setting; only the percentile is a matter of degree."""
    total = 0.0
    for name, value in setting.items():
        given = values.get(name, value)
        total += abs(np.log10(value / given)) if name.endswith(PERCENTILE_TAIL) else 100.0 * (value != given)
    return total
