"""The planner and its surrogate, on problems whose true costs are known."""

import itertools
from dataclasses import replace

import moocore
import numpy as np
import optuna
import pytest
from analytic import plain_settings
from networks import network

from qsearch.measure.measurement import Accuracy, Latency, Measurement, Memory
from qsearch.search import planner, wanted
from qsearch.search.bound_space import bind_space
from qsearch.search.constraints import Constraints
from qsearch.search.planner import DRAFTED, PlannerSampler, drafted_trials, tried_configs
from qsearch.search.samplers import make_sampler
from qsearch.search.space import SearchSpace, load_space
from qsearch.search.surrogate import (
    LossCurve,
    Observation,
    Score,
    correct_divergence,
    correct_latency,
    fit_loss_curve,
    fit_surrogate,
)
from qsearch.search.tables.cost import Cost
from qsearch.search.tables.layer_tables import Tables
from qsearch.search.tables.pairwise import PairwiseSum
from qsearch.search.tables.settings import Setting, table_settings

GRAPH = network("bottlenecks")[0].graph
SPACE = bind_space(
    SearchSpace.model_validate(
        {"version": 1, "name": "two modes", "precisions": {"default": ["fp32", "int8"]}, "calibration": {"modes": ["max", "mse"]}}
    ),
    GRAPH,
)
LAYERS = len(SPACE.layers)
IMAGES = 400


def objectives(measured):
    return measured.latency.median_ms, float(measured.memory.peak_bytes), measured.accuracy.top1_loss_pp


class Problem:
    """True costs, the tables' errors about them, and noise of measurement that is fixed per configuration."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        fp32 = rng.lognormal(0, 0.6, LAYERS)
        pairs = {(i, i + 1): rng.uniform(0, 0.1) * (1 - np.eye(2)) for i in range(LAYERS - 1)}
        self.latency = PairwiseSum(
            tuple(np.array([a, a / b]) for a, b in zip(fp32, rng.uniform(1.2, 4, LAYERS), strict=True)), pairs
        )
        self.bytes = PairwiseSum(tuple(np.array([b, b / 4]) for b in rng.lognormal(10, 1, LAYERS).round()), {})
        nats = rng.lognormal(0, 1.5, LAYERS)
        nats *= 0.15 / nats.sum()
        self.nats = PairwiseSum(tuple(np.array([0, n]) for n in nats), {})
        self.table_latency = PairwiseSum(tuple(t * rng.lognormal(0, 0.1, 2) for t in self.latency.unary), pairs)
        self.table_nats = PairwiseSum(tuple(t * rng.lognormal(0, 0.5) for t in self.nats.unary), {})
        self.baseline = self.measure(SPACE.config({one.name: "fp32" for one in SPACE.layers} | {"calibration": "max"}))

    def row(self, config):
        return np.array([[one.values.index(config.precision[one.name]) for one in SPACE.layers]])

    def factor(self, config):
        return {"max": 2.0, "mse": 1.0}[config.calibration.mode]

    def measure(self, config):
        row, noise = self.row(config), np.random.default_rng(int(config.content_hash()[:8], 16))
        nats = float(self.nats(row)[0]) * self.factor(config)
        loss = round((25 * nats + noise.normal(0, 0.2 * (nats > 0))) * IMAGES / 100) * 100 / IMAGES
        latency = float(self.latency(row)[0]) * (1 + noise.normal(0, 0.005))
        accuracy = Accuracy(80 - loss, 95.0, loss, (loss - 0.5, loss + 0.5), IMAGES, "", nats)
        return Measurement(Latency(latency, 0.0, 21, 1), Memory(int(self.bytes(row)[0]), 1000, 0), accuracy)

    def tables(self):
        def scaled(config):
            return PairwiseSum(tuple(self.factor(config) * one for one in self.table_nats.unary), {})

        def cost(config):
            row = self.row(config)
            return Cost(float(self.table_latency(row)[0]), int(self.bytes(row)[0]) + 1000)

        return Tables(self.table_latency, self.bytes, scaled, cost, self.baseline, plain_settings(SPACE))

    def hypervolume(self, values, limits=(np.inf, np.inf, np.inf)):
        """Of the values within limits."""
        scale = (self.baseline.latency.median_ms, self.baseline.memory.peak_bytes, 10.0)
        corner = np.minimum(np.divide(limits, scale) + 0.02, 1.0)
        points = np.array([one for one in values if (np.array(one) <= limits).all()]).reshape(-1, 3) / scale
        points = np.clip(points, 0, None)
        points = points[(points < corner).all(1)]
        return float(moocore.hypervolume(points, ref=corner)) if len(points) else 0.0

    def every(self):
        """Objectives of every configuration."""
        values = []
        for row in itertools.product(range(2), repeat=LAYERS):
            layers = {one.name: one.values[v] for one, v in zip(SPACE.layers, row, strict=True)}
            for mode in ("max", "mse"):
                values.append(objectives(self.measure(SPACE.config({**layers, "calibration": mode}))))
        return values

    def search(self, sampler, budget):
        study = optuna.create_study(directions=["minimize"] * 3, sampler=sampler)
        values, seen = [], set()
        for _ in range(budget):
            trial = study.ask(SPACE.distributions())
            config = SPACE.config(trial.params)
            measured = self.measure(config)
            trial.set_user_attr("config_hash", config.content_hash())
            trial.set_user_attr("config", config.to_json())
            trial.set_user_attr("measurement", measured.to_json())
            seen.add(config.content_hash())
            values.append(objectives(measured))
            study.tell(trial, values[-1])
        return values, len(seen)


@pytest.mark.parametrize("seed", range(3))
def test_the_planner_finds_nearly_the_whole_front_where_random_finds_part(seed):
    problem = Problem(seed)
    reference = problem.hypervolume(problem.every())
    planned, distinct = problem.search(PlannerSampler(SPACE, problem.tables(), seed), 25)
    drawn, _ = problem.search(make_sampler("random", seed, 0), 25)
    assert distinct == 25
    assert problem.hypervolume(planned) >= 0.95 * reference
    assert problem.hypervolume(planned) > problem.hypervolume(drawn)


@pytest.mark.parametrize("seed", range(2))
def test_limits_narrow_the_front_that_is_planned(seed):
    problem = Problem(seed)
    every = problem.every()
    limits = (float(np.quantile([one[0] for one in every], 0.3)), np.inf, float(np.quantile([one[2] for one in every], 0.4)))
    constraints = Constraints.against(problem.baseline, {"latency_ms": limits[0], "top1_loss_pp": limits[2]})
    narrowed, _ = problem.search(PlannerSampler(SPACE, problem.tables(), seed, constraints), 20)
    inside = [(np.array(one) <= limits).all() for one in narrowed]
    assert np.mean(inside) > 2 * np.mean([(np.array(one) <= limits).all() for one in every])
    assert problem.hypervolume(narrowed, limits) >= 0.95 * problem.hypervolume(every, limits)


def test_limits_that_nothing_meets_bring_the_closest():
    problem = Problem(0)
    fastest = min(one[0] for one in problem.every())
    constraints = Constraints.against(problem.baseline, {"latency_ms": 0.5 * fastest})
    values, _ = problem.search(PlannerSampler(SPACE, problem.tables(), 0, constraints), 10)
    assert min(one[0] for one in values) <= 1.05 * fastest


def test_settings_are_every_combination_the_percentile_at_a_few_points():
    space = bind_space(
        SearchSpace.model_validate({"version": 1, "name": "all", "precisions": {"default": ["fp32", "int8"]}}), GRAPH
    )
    modes = [setting["calibration"] for setting in table_settings(space)]
    granularities = len(next(one.values for one in space.settings if one.name == "granularity"))
    assert modes.count("percentile") == 3 * granularities
    assert all(modes.count(mode) == granularities for mode in set(modes) - {"percentile"})


def observations(problem, count, seed):
    rng = np.random.default_rng(seed)
    found = []
    for row in rng.integers(0, 2, (count, LAYERS)):
        nats = float(problem.nats(row[None])[0])
        score = Score(nats, 25 * nats, 0.2)
        found.append(Observation(row, 0, float(problem.latency(row[None])[0]), 1000, score))
    return found


def observed(problem, config, setting):
    found = problem.measure(config)
    score = Score(found.accuracy.divergence, found.accuracy.top1_loss_pp, 0.25)
    return Observation(problem.row(config)[0], setting, found.latency.median_ms, found.memory.peak_bytes, score)


def test_measured_trials_correct_the_tables():
    problem = Problem(4)
    seen, unseen = observations(problem, 60, 0), observations(problem, 200, 1)
    rows = np.stack([one.assignment for one in unseen])
    for truth, table, corrected in (
        (problem.latency, problem.table_latency, correct_latency([problem.table_latency], seen, [0])[0][0]),
        (problem.nats, problem.table_nats, correct_divergence([problem.table_nats], seen)[0][0]),
    ):
        before, after = (np.abs(one(rows) - truth(rows)).mean() for one in (table, corrected))
        assert after < 0.4 * before


def test_kernels_of_some_settings_may_be_told_too_fast_as_a_whole():
    problem = Problem(5)
    # Settings 0 and 1 run the same kernels, 2 others, twice as slow and a fifteenth slower than the tables tell.
    told, off = [problem.latency, problem.latency, problem.latency.scaled(2.0)], (1.0, 1.0, 1.07)
    rng = np.random.default_rng(0)
    rows, settings = rng.integers(0, 2, (60, LAYERS)), rng.integers(0, 3, 60)
    seen = [
        Observation(row, int(setting), float(told[setting](row[None])[0]) * off[setting], 1000, None)
        for row, setting in zip(rows, settings, strict=True)
    ]
    row = np.ones((1, LAYERS), np.int64)
    found = [float(table(row)[0]) for table in correct_latency(told, seen, [0, 0, 2])[0]]
    assert found[0] == found[1]
    for predicted, table, factor in zip(found, told, off, strict=True):
        assert predicted == pytest.approx(factor * table(row)[0], rel=0.02)


def test_a_record_without_a_divergence_tells_of_latency_alone():
    problem = Problem(4)
    seen, (old,) = observations(problem, 20, 0), observations(problem, 1, 1)
    told = [*seen, replace(old, score=replace(old.score, divergence=None))]
    assert fit_loss_curve(told) == fit_loss_curve(seen)
    rows = np.stack([one.assignment for one in seen])
    for some, all_ in zip(
        correct_divergence([problem.table_nats], seen)[0], correct_divergence([problem.table_nats], told)[0], strict=True
    ):
        np.testing.assert_array_equal(some(rows), all_(rows))
    before, after = (fit_surrogate([problem.table_latency], [problem.table_nats], one, [0]).latencies[0] for one in (seen, told))
    assert not np.array_equal(before(rows), after(rows))


def test_what_a_slow_machine_does_to_ratios_is_no_property_of_layers():
    problem = Problem(6)
    rng = np.random.default_rng(1)
    # The later the slower, by up to a half, and the later the more int8.
    slow = np.linspace(1.0, 1.5, 60)
    rows = (rng.random((60, LAYERS)) < np.linspace(0.1, 0.9, 60)[:, None]).astype(int)
    true = problem.latency(rows)
    told = [float(ms * factor**-0.08) for ms, factor in zip(true, slow, strict=True)]
    seen = [Observation(row, 0, ms, 1000, None, slowdown=one) for row, ms, one in zip(rows, told, slow, strict=True)]
    *_, power = correct_latency([problem.latency], seen, [0])
    assert power == pytest.approx(-0.08, abs=0.02)
    model = fit_surrogate([problem.latency], [problem.nats], seen, [0])
    np.testing.assert_allclose(model.believed_ms(seen), true, rtol=0.01)
    blind = [replace(one, slowdown=1.0) for one in seen]
    assert abs(fit_surrogate([problem.latency], [problem.nats], blind, [0]).believed_ms(blind) / true - 1).max() > 0.02


def test_nothing_is_corrected_without_trials():
    problem = Problem(0)
    assert correct_latency([problem.table_latency] * 2, [], [0, 0]) == ([problem.table_latency] * 2, 0.0, 0.0)
    assert correct_divergence([problem.table_nats], [])[0] == [problem.table_nats]
    assert fit_loss_curve([]) == LossCurve()


def test_the_loss_curve_follows_the_trials():
    curve = fit_loss_curve(observations(Problem(1), 80, 2))
    assert curve.exponent == 1.0
    np.testing.assert_allclose(curve(np.array([0.1, 0.0])), [2.5, 0.0], rtol=0.02)


def test_a_stopped_trial_moves_the_tables_less_than_one_that_was_seen_whole():
    problem = Problem(2)
    row = np.ones(LAYERS, np.int64)
    seen = observations(problem, 4, 3)
    before = fit_surrogate([problem.table_latency], [problem.table_nats], seen, [0])
    promised = float(before.divergences[0](row[None])[0])

    def after(factor, whole=False):
        score = Score(factor * promised, 25 * factor * promised, 0.2) if whole else None
        last = Observation(row, 0, 1.0, 1000, score, estimate=None if whole or factor is None else factor * promised)
        return fit_surrogate([problem.table_latency], [problem.table_nats], [*seen, last], [0])

    def predicted(model):
        return float(model.divergences[0](row[None])[0])

    assert predicted(after(1.0)) == pytest.approx(promised, rel=0.01)
    assert promised < 1.02 * promised < predicted(after(3.0)) < predicted(after(3.0, whole=True))
    assert promised > 0.95 * promised > predicted(after(0.2)) > predicted(after(0.2, whole=True))
    # Of one that was stopped before its first image, the latency was measured nevertheless.
    assert predicted(after(None)) == promised
    assert after(None).latencies[0](row[None])[0] != before.latencies[0](row[None])[0]


def test_the_error_of_a_divergence_shrinks_where_trials_are_and_covers_what_comes():
    problem = Problem(4)
    unseen = observations(problem, 200, 1)
    rows, truth = np.stack([one.assignment for one in unseen]), np.array([one.score.divergence for one in unseen])
    settings = np.zeros(len(rows), np.int64)
    errors = []
    for trials in (0, 5, 60):
        (table,), error = correct_divergence([problem.table_nats], observations(problem, trials, 0))
        errors.append(error(rows, settings))
        within = np.abs(table(rows) - truth) <= 2 * errors[-1]
        assert within.mean() >= 0.9
    assert errors[0].mean() > errors[1].mean() > errors[2].mean() > 0


def test_what_is_uncertain_of_a_loss_is_luck_and_the_divergence():
    curve = LossCurve(factor_pp=40.0, exponent=1.0, sd_pp=0.4)
    nats = np.array([0.0, 0.01, 0.1])
    sure, unsure = curve.sd(nats, np.zeros(3)), curve.sd(nats, np.full(3, 0.05))
    assert sure[0] == 0 and (np.diff(sure) > 0).all() and (sure < 0.4).all()
    np.testing.assert_allclose(unsure, np.hypot(sure, 2.0))


def test_trials_that_were_stopped_early_are_learned_from():
    problem = Problem(5)
    sampler = PlannerSampler(SPACE, problem.tables(), 0)
    study = optuna.create_study(directions=["minimize"] * 3, sampler=sampler)
    trial = study.ask(SPACE.distributions())
    config = SPACE.config(trial.params)
    # On a machine a quarter slower.
    latency = vars(Latency(7.0, 0.1, 21, 3, ratio=0.5, raw_ms=8.75))
    stopped = {"bound": {"divergence": 0.25, "latency": latency}, "peak_bytes": 9000}
    for name, value in {"config": config.to_json(), "config_hash": config.content_hash(), **stopped}.items():
        trial.set_user_attr(name, value)
    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    (seen,) = sampler.observations(study)
    assert (seen.score, seen.latency_ms, seen.estimate, seen.slowdown) == (None, 7.0, 0.25, 1.25)
    assert SPACE.config(study.ask(SPACE.distributions()).params) != config


def test_what_is_being_measured_is_not_proposed_again_nor_its_like():
    problem = Problem(6)
    sampler = PlannerSampler(SPACE, problem.tables(), 0)
    study = optuna.create_study(directions=["minimize"] * 3, sampler=sampler)
    pending, predicted = [], []
    for _ in range(6):
        trial = study.ask(SPACE.distributions())
        config = SPACE.config(trial.params)
        trial.set_user_attr("config_hash", config.content_hash())
        trial.set_user_attr("config", config.to_json())
        pending.append(config)
        predicted.append(objectives(problem.measure(config)))
    assert len({config.content_hash() for config in pending}) == 6
    # Six proposals without an answer, and yet together they cover most of what there is.
    assert problem.hypervolume(predicted) >= 0.9 * problem.hypervolume(problem.every())


def test_an_enqueued_trial_is_not_planned(monkeypatch):
    problem = Problem(0)
    study = optuna.create_study(directions=["minimize"] * 3, sampler=(sampler := PlannerSampler(SPACE, problem.tables(), 0)))
    whole = {"calibration": "mse"} | {one.name: one.values[0] for one in SPACE.layers}
    study.enqueue_trial(whole)
    study.enqueue_trial({"calibration": "mse"})
    planned = []
    monkeypatch.setattr(sampler, "propose", lambda *arguments: planned.append(arguments) or whole)
    assert study.ask(SPACE.distributions()).params == whole
    assert not planned
    assert study.ask(SPACE.distributions()).params == whole
    assert len(planned) == 1


def test_what_was_stopped_before_its_first_image_is_no_front_member():
    problem = Problem(1)
    sampler = PlannerSampler(SPACE, problem.tables(), 0)
    # Faster than what was scored, and as far as it was seen without a loss.
    stopped = Observation(np.ones(LAYERS, np.int64), 0, 0.01, 1000, None)
    scored = Observation(np.zeros(LAYERS, np.int64), 0, 1.0, 1000, Score(0.0, 0.0, 0.1))
    sizes = np.array(problem.table_latency.sizes)

    def model(seen):
        return fit_surrogate(problem.tables().latencies, sampler.divergences, seen, sampler.storages)

    assert sampler._changes(model([stopped]), [stopped], sizes) == []
    assert max(int(row.sum()) for row in sampler._changes(model([scored, stopped]), [scored, stopped], sizes)) <= 2


def test_a_lucky_timing_hides_less():
    problem = Problem(3)
    sampler = PlannerSampler(SPACE, problem.tables(), 0)
    configs = [SPACE.config(values) for values in SPACE.all_values() if values["calibration"] == "mse"]
    seen = [observed(problem, configs[i], 1) for i in np.random.default_rng(0).choice(len(configs), 40, replace=False)]
    fastest = min(range(len(seen)), key=lambda i: seen[i].latency_ms)
    lucky = [replace(one, latency_ms=0.94 * one.latency_ms) if i == fastest else one for i, one in enumerate(seen)]
    model = fit_surrogate(problem.tables().latencies, sampler.divergences, lucky, sampler.storages)
    true, timed = (one[fastest].latency_ms / problem.baseline.latency.median_ms for one in (seen, lucky))
    believed = sampler._front(model, lucky, [])[:, 0].min()
    assert 1.01 * timed < believed < true


def test_what_was_timed_within_a_limit_counts_as_within():
    problem = Problem(3)
    one = observed(problem, SPACE.config({layer.name: "int8" for layer in SPACE.layers} | {"calibration": "mse"}), 1)
    sampler = PlannerSampler(SPACE, problem.tables(), 0, Constraints({"latency_ms": 1.001 * one.latency_ms}))
    plain = fit_surrogate(problem.tables().latencies, sampler.divergences, [], sampler.storages)
    told = float(plain.latency_ms(one.assignment[None], np.array([1]), np.zeros(1))[0])
    slower = replace(plain, latencies=[table.scaled(1.02 * one.latency_ms / told) for table in plain.latencies])
    ((latency, *_),) = sampler._front(slower, [one], [])
    assert latency == pytest.approx(1.01 * one.latency_ms / problem.baseline.latency.median_ms)
    faster = replace(plain, latencies=[table.scaled(0.9 * one.latency_ms / told) for table in plain.latencies])
    assert len(sampler._front(faster, [replace(one, latency_ms=1.01 * one.latency_ms)], [])) == 0


def test_what_is_remembered_of_candidates_does_not_keep_their_whole_proposal():
    problem = Problem(0)
    sampler = PlannerSampler(SPACE, problem.tables(), 0)
    before = len(sampler.planned)
    problem.search(sampler, 8)
    assert len(sampler.planned) > before
    assert all(row.base is None for row in sampler.planned), "a view keeps all that it is a view of"


def test_where_every_candidate_is_known_a_neighbour_is_proposed():
    problem = Problem(2)
    configs = [SPACE.config(values) for values in SPACE.all_values()]
    rng = np.random.default_rng(0)
    for left in rng.choice(len(configs), 4, replace=False):
        known = {config.content_hash() for config in configs} - {configs[left].content_hash()}
        values = PlannerSampler(SPACE, problem.tables(), 0).propose([], known)
        assert SPACE.config(values) == configs[left]
    everything = {config.content_hash() for config in configs}
    assert SPACE.config(PlannerSampler(SPACE, problem.tables(), 0).propose([], everything)) in configs


def test_what_was_measured_in_its_best_setting_is_a_candidate_in_the_next():
    problem = Problem(1)
    sampler, modes = PlannerSampler(SPACE, problem.tables(), 0), [one.values["calibration"] for one in problem.tables().settings]
    measured = []
    for value in (0, 1):
        config = SPACE.config({one.name: one.values[value] for one in SPACE.layers} | {"calibration": "mse"})
        measured.append(observed(problem, config, modes.index("mse")))
    rows, settings, nats = sampler._candidates(
        fit_surrogate(problem.tables().latencies, sampler.divergences, measured, sampler.storages), measured
    )
    found = {tuple(row): (modes[setting], one) for row, setting, one in zip(rows.tolist(), settings, nats, strict=True)}
    uniform = {(0,) * LAYERS, (1,) * LAYERS}
    assert uniform < found.keys(), "the ends of the predicted front are among its candidates"
    assert all((mode == "max") == (row in uniform) and np.isfinite(one) for row, (mode, one) in found.items())


def test_tables_that_take_long_come_late():
    many = bind_space(load_space("full"), GRAPH)
    assert drafted_trials(SPACE) == 0 < drafted_trials(many) <= DRAFTED


def test_what_was_tried_is_the_front_and_then_the_latest(monkeypatch):
    monkeypatch.setattr(planner, "TRIED", 5)
    study = optuna.create_study(directions=["minimize"] * 3)
    assert tried_configs(study) == []
    values = [(9.0, 9.0, 9.0), (1.0, 3.0, 2.0), (9.0, 9.0, 8.0), (3.0, 1.0, 2.0), (9.0, 8.0, 9.0), (8.0, 9.0, 9.0)]
    made = []
    for number, objectives in enumerate(values):
        config = SPACE.config({one.name: one.values[number >> i & 1] for i, one in enumerate(SPACE.layers)})
        made.append(config)
        study.add_trial(optuna.trial.create_trial(values=objectives, user_attrs={"config": config.to_json(), "measurement": {}}))
    assert tried_configs(study) == [made[3], made[1], made[5], made[4], made[2]]


class Converting(Problem):
    """Changes of precision from layer to layer take long, which exact costs know of and tables do not."""

    def __init__(self, seed):
        super().__init__(seed)
        self.table_latency = PairwiseSum(self.latency.unary, {})
        mean = sum(float(one.mean()) for one in self.latency.unary)
        changes = {(i, i + 1): 0.5 * mean / LAYERS * (1 - np.eye(2)) for i in range(LAYERS - 1)}
        self.latency = PairwiseSum(self.latency.unary, changes)

    def tables(self):
        found = super().tables()

        def cost(config):
            return replace(found.cost(config), latency_ms=float(self.latency(self.row(config))[0]))

        return replace(found, cost=cost)


@pytest.mark.parametrize("seed", range(3))
def test_what_neighbours_cost_counts_once_when_trials_have_told_it(monkeypatch, seed):
    problem = Converting(seed)
    sampler = PlannerSampler(SPACE, problem.tables(), seed)
    configs = [SPACE.config(values) for values in SPACE.all_values() if values["calibration"] == "mse"]
    tried = [configs[i] for i in np.random.default_rng(seed).choice(len(configs), 50, replace=False)]
    seen = []
    for row, config in ((problem.row(one), one) for one in tried):
        beside_ms = float(problem.latency(row)[0] - problem.table_latency(row)[0])
        seen.append(replace(observed(problem, config, 0), beside_ms=beside_ms))
    weighed, merits = [], wanted.Wanted.merits
    monkeypatch.setattr(
        wanted.Wanted,
        "merits",
        lambda self, points, *more: weighed.append((points[0], merits(self, points, *more))) or weighed[-1][1],
    )
    known = {one.content_hash() for one in tried}
    chosen = SPACE.config(sampler.propose(seen, known))
    told = max(weighed, key=lambda pair: tuple(pair[1][0]))[0][0] * problem.baseline.latency.median_ms
    assert told == pytest.approx(problem.measure(chosen).latency.median_ms, rel=0.05)


class Stored(Problem):
    """One of the modes costs time and bytes in every int8 layer."""

    def __init__(self, seed):
        super().__init__(seed)
        self.added_ms = PairwiseSum(tuple(np.array([0.0, 0.15 * t[1]]) for t in self.latency.unary), {})
        self.added_bytes = PairwiseSum(tuple(np.array([0.0, 0.15 * b[1]]) for b in self.bytes.unary), {})

    def added(self, config):
        row, dear = self.row(config), config.calibration.mode == "mse"
        return float(self.added_ms(row)[0]) * dear, int(self.added_bytes(row)[0]) * dear

    def measure(self, config):
        found, (ms, held) = super().measure(config), self.added(config) if hasattr(self, "added_ms") else (0.0, 0)
        latency = replace(found.latency, median_ms=found.latency.median_ms + ms)
        return replace(found, latency=latency, memory=replace(found.memory, weight_bytes=found.memory.weight_bytes + held))

    def tables(self):
        found = super().tables()

        def cost(config):
            (ms, held), plain = self.added(config), found.cost(config)
            return Cost(plain.latency_ms + ms, plain.peak_bytes + held)

        dear = [one.values["calibration"] == "mse" for one in found.settings]
        settings = tuple(
            Setting(one.values, self.added_ms, self.added_bytes) if is_dear else one
            for one, is_dear in zip(found.settings, dear, strict=True)
        )
        return replace(found, cost=cost, settings=settings)


@pytest.mark.parametrize("seed", range(3))
def test_settings_that_cost_bytes_are_weighed_against_those_that_do_not(seed):
    problem = Stored(seed)
    reference = problem.hypervolume(problem.every())
    sampler = PlannerSampler(SPACE, problem.tables(), seed)
    planned, _ = problem.search(sampler, 25)
    assert problem.hypervolume(planned) >= 0.95 * reference
    blind = replace(problem.tables(), settings=Problem(seed).tables().settings, cost=Problem(seed).tables().cost)
    unknowing, _ = problem.search(PlannerSampler(SPACE, blind, seed), 25)
    assert problem.hypervolume(planned) > problem.hypervolume(unknowing)


def test_many_candidates_are_screened_by_what_they_might_add(monkeypatch):
    part = wanted.Wanted(np.full(3, np.inf), np.ones(3))
    rng = np.random.default_rng(0)
    points, front = rng.uniform(0.2, 1.0, (400, 3)), np.full((1, 3), 0.5)
    exact = part.order(points, np.full(400, 0.02), front)
    assert sorted(exact) == list(range(400))
    monkeypatch.setattr(wanted, "SCREENED", 40)
    screened = part.order(points, np.full(400, 0.02), front)
    assert sorted(screened) == list(range(400)) and screened[:10] == exact[:10]
