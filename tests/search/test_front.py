"""The front of a study: dominance, hypervolume, picks, held-out verdicts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from analytic import AnalyticEvaluator

from qsearch.config import QuantConfig
from qsearch.errors import StudyError, UsageError
from qsearch.measure.measurement import Accuracy, Latency, Measurement, Memory
from qsearch.search.bound_space import bind_space
from qsearch.search.front import (
    FLOAT_TRIAL,
    FrontPoint,
    Heldout,
    beats_float,
    hypervolume,
    kept_points,
    load_heldout,
    pick,
    record_heldout,
    study_front,
)
from qsearch.search.loop.driver import Limits, SearchProblem, run_search
from qsearch.search.space import load_space
from qsearch.search.study import Identity, study_to_search
from qsearch.search.study_trials import finished


def measurement(latency_ms: float, peak_bytes: int, loss_pp: float) -> Measurement:
    """A measurement with these objectives."""
    accuracy = Accuracy(90 - loss_pp, 99.0, loss_pp, (loss_pp - 1, loss_pp + 1), 500, "0" * 64)
    return Measurement(Latency(latency_ms, 0.01, 5, 10), Memory(peak_bytes, 0, 0), accuracy)


def point(trial: int, latency_ms: float, peak_bytes: int, loss_pp: float) -> FrontPoint:
    """A front point with these objectives."""
    return FrontPoint(trial, QuantConfig(), measurement(latency_ms, peak_bytes, loss_pp))


FLOAT = measurement(10.0, 1000, 0.0)
FRONT = (point(1, 2.0, 500, 4.0), point(2, 4.0, 250, 6.0), point(3, 5.0, 500, 1.0), point(4, 9.5, 900, 0.0))


def test_front_of_a_study(tmp_path: Path) -> None:
    evaluator = AnalyticEvaluator()
    with study_to_search("demo", Identity({"model": "a"}), f"sqlite:///{tmp_path}/a.db") as handle:
        assert study_front(handle.study) == ()
        run_search(handle, SearchProblem(bind_space(load_space("default"), evaluator.graph), evaluator.evaluate), Limits(16))
        front = study_front(handle.study)
        every = np.array([trial.values for trial in finished(handle.study)])
        for one in front:
            worse = (every <= one.objectives).all(axis=1) & (every < one.objectives).any(axis=1)
            assert not worse.any()
            assert evaluator._measure(one.config).accuracy == one.measurement.accuracy
        assert {one.trial for one in front} <= {trial.number for trial in handle.study.best_trials}
        assert [one.objectives for one in front] == sorted(one.objectives for one in front)
        assert all(one.heldout is None for one in front)

        record_heldout(handle.study, front, evaluator.verify_front([one.config for one in front]))
        again = study_front(handle.study)
        assert set(load_heldout(handle.study)) == {one.trial for one in front}
        for before, after in zip(front, again, strict=True):
            assert after.heldout is not None
            assert after.heldout.accuracy.top1_loss_pp == pytest.approx(
                before.objectives[2] + (0.25 if "int8" in before.config.precision.values() else 0.0)
            )
            assert isinstance(after.heldout.accuracy.top1_loss_ci_pp, tuple)


def test_a_second_measurement_tells_who_is_dominated(tmp_path: Path) -> None:
    with study_to_search("demo", Identity({"model": "a"}), f"sqlite:///{tmp_path}/a.db") as handle:
        worse = measurement(6.0, 0, 1.5)
        verdicts = [(one.measurement.latency, one.measurement.accuracy) for one in FRONT[:3]]
        record_heldout(handle.study, [*FRONT[:3], point(5, 3.0, 600, 2.0)], [*verdicts, (worse.latency, worse.accuracy)])
        heldout = load_heldout(handle.study)
    assert {trial: one.dominated_by for trial, one in heldout.items()} == {1: None, 2: None, 3: None, 5: 3}


def test_hypervolume_is_a_share_of_the_box_below_float() -> None:
    assert hypervolume([], FLOAT) == 0.0
    assert hypervolume([point(0, 10.0, 1000, 0.0)], FLOAT) == 0.0
    assert hypervolume([point(0, 5.0, 500, 5.0)], FLOAT) == pytest.approx(0.125)
    assert hypervolume([point(0, 5.0, 500, -3.0)], FLOAT) == pytest.approx(0.25)
    assert hypervolume([point(0, 12.0, 500, 0.0), point(1, 5.0, 500, 11.0)], FLOAT) == 0.0
    assert hypervolume([point(0, 5.0, 500, 0.0), point(1, 2.5, 1000, 0.0)], FLOAT) == pytest.approx(0.25)
    assert 0.0 < hypervolume(FRONT, FLOAT) < 1.0


@pytest.mark.parametrize("how, trial", [("fastest", 1), ("smallest", 2), ("most-accurate", 4), ("knee", 3)])
def test_picks(how: str, trial: int) -> None:
    assert pick(FRONT, how).trial == trial


def test_picks_within_a_bound() -> None:
    assert pick(FRONT, "fastest", max_loss_pp=1.0).trial == 3
    with pytest.raises(StudyError, match=r"the least is 0\.00 pp"):
        pick(FRONT, "fastest", max_loss_pp=-1.0)
    with pytest.raises(StudyError, match="empty"):
        pick((), "knee")
    with pytest.raises(UsageError, match="most-accurate"):
        pick(FRONT, "best")


def test_picks_go_by_the_held_out_verdict() -> None:
    slow = measurement(8.0, 500, 4.5)
    seen_again = replace(FRONT[0], heldout=Heldout(slow.latency, slow.accuracy))
    assert pick([seen_again, *FRONT[1:]], "fastest").trial == 2
    beaten = replace(FRONT[1], heldout=Heldout(slow.latency, slow.accuracy, dominated_by=3))
    # 1 and 3 are equally small; 3 is the nearer to the ideal.
    assert pick([seen_again, beaten, *FRONT[2:]], "smallest").trial == 3
    assert pick([beaten], "smallest").trial == 2


def test_float_is_picked_where_nothing_beats_it() -> None:
    slower, larger = point(1, 11.0, 1000, 0.5), point(2, 9.999, 1100, 0.5)
    # A difference within the spread of the time is none.
    assert not beats_float([slower, larger], FLOAT)
    assert pick([slower, larger], "fastest", baseline=FLOAT).trial == FLOAT_TRIAL
    assert pick([slower, larger], "fastest", baseline=FLOAT).measurement is FLOAT
    assert pick([slower, larger], "fastest").trial == 2
    for better in (point(3, 9.0, 1000, 0.5), point(3, 11.0, 900, 0.5), point(3, 11.0, 1000, -1.5)):
        assert beats_float([slower, better], FLOAT)
        assert pick([slower, better], "most-accurate", baseline=FLOAT).trial != FLOAT_TRIAL
    # What looked faster in the search and is not when measured again does not count.
    again = measurement(10.5, 1000, 0.5)
    assert not beats_float([replace(point(3, 9.0, 1000, 0.5), heldout=Heldout(again.latency, again.accuracy))], FLOAT)


def test_kept_points() -> None:
    again = measurement(8.0, 500, 4.5)
    dropped = replace(FRONT[0], heldout=Heldout(again.latency, again.accuracy, dominated_by=3))
    assert kept_points([dropped, *FRONT[1:]]) == FRONT[1:]
