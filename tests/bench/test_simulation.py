"""The simulation: nothing is lost or counted twice, nothing is busier than it can be, nothing is faster than its bounds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("simpy")

from farm import ADVICE, Farm, simulate
from simulation import measured_farm
from simulation_plot import draw_scale

STEPS = ("ask", "build", "latency", "accuracy", "tell")
ROWS = st.lists(st.fixed_dictionaries({step: st.floats(0.001, 2.0) for step in STEPS}), min_size=1, max_size=4)
FARMS = st.builds(
    Farm,
    workers=st.integers(1, 12),
    devices=st.integers(1, 12),
    rows=ROWS,
    storage_s=st.lists(st.floats(0.0, 0.02), min_size=1, max_size=3),
    lanes=st.integers(1, 3),
    transactions=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    deaths_per_s=st.sampled_from((0.0, 0.005, 0.1, 1.0)),
    heartbeat_s=st.floats(0.1, 20.0),
    restart_s=st.floats(0.1, 5.0),
    pipelined=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(FARMS, st.integers(0, 9))
def test_every_trial_ends_once_and_nothing_is_busier_than_it_can_be(farm: Farm, seed: int) -> None:
    run = simulate(farm, seed, wanted=80)
    assert sorted(number for number, _, _ in run.ended) == list(range(80)) == sorted(run.begun)
    assert max(run.begun.values()) <= 2 and run.asked == 80
    given_up = {number for number, _, measured in run.ended if not measured}
    assert all(run.begun[number] == 2 for number in given_up)
    if not farm.deaths_per_s:
        assert set(run.begun.values()) == {1} and not given_up
    report = run.report()
    assert set(report["utilisation"]) == set(ADVICE)
    assert all(0 <= used <= 1.0005 for used in report["utilisation"].values())


@settings(max_examples=30, deadline=None)
@given(FARMS, st.integers(0, 9))
def test_work_that_is_done_takes_its_time(farm: Farm, seed: int) -> None:
    """No resource does more than its places could in the time: the bounds, with the rows that were really drawn."""
    run = simulate(farm, seed, wanted=60)
    total = run.env.now
    for step, places in (("latency", farm.devices), ("latency", farm.workers), ("accuracy", farm.workers), ("ask", 1)):
        least = 60 * min(row[step] for row in farm.rows) * (0 if farm.deaths_per_s else 1)
        assert total * places >= least * 0.9999


CONSTANT = ({"ask": 0.02, "build": 0.3, "latency": 0.4, "accuracy": 0.5, "tell": 0.05},)


def rate(**options: object) -> float:
    given: dict = {"workers": 1, "devices": 1, "rows": CONSTANT, "storage_s": (0.001,), "transactions": (5, 5)} | options
    return float(simulate(Farm(**given)).report()["trials_per_hour"])


def test_one_worker_is_what_its_steps_add_up_to() -> None:
    assert rate(pipelined=False) == pytest.approx(3600 / (0.02 + 0.3 + 0.4 + 0.5 + 0.05 + 0.01), rel=1e-3)
    # Two processes: the slower of the two sets the pace.
    assert rate(pipelined=True) == pytest.approx(3600 / 0.9, rel=1e-2)


def test_more_workers_and_devices_are_not_slower_and_keep_within_the_bounds() -> None:
    for devices in (1, 2, 8, 64):
        rates = [rate(workers=workers, devices=devices) for workers in (1, 2, 4, 8, 16, 32, 64)]
        assert all(after >= 0.98 * before for before, after in zip(rates, rates[1:], strict=False))
        # Asking is serialised, and a device does 2.5 modules a second.
        assert max(rates) <= 1.02 * min(3600 * devices / 0.4, 3600 / 0.025)
        assert rates[-1] == pytest.approx(min(3600 * devices / 0.4, 3600 / 0.025, 64 * 3600 / 0.9), rel=0.05)


def test_deaths_cost_what_is_lost_by_them() -> None:
    calm, deadly = rate(workers=8, devices=8), rate(workers=8, devices=8, deaths_per_s=1 / 60)
    assert 0.4 * calm < deadly < 0.95 * calm


def measured_by(seconds: float) -> dict:
    transactions = {"per_second": 1 / seconds, "seconds": [seconds], "mean_with_waiting": seconds}
    work = {"date": "", "machine": "", "transactions": {"ask": 4.0, "tell": 6.0}, "rows": list(CONSTANT)}
    return {"workloads": {"w": work}, "storages": {"sqlite": {"clients": {"1": transactions}}}}


def test_what_a_step_took_of_the_storage_is_not_counted_twice() -> None:
    farm = measured_farm(measured_by(0.001), "w", "sqlite", workers=1, devices=1, pipelined=False)
    assert farm.rows[0]["ask"] == pytest.approx(0.016) and farm.rows[0]["tell"] == pytest.approx(0.044)
    assert farm.lanes == 1 and farm.rows[0]["build"] == 0.3
    assert simulate(farm).report()["trials_per_hour"] == pytest.approx(3600 / sum(CONSTANT[0].values()), rel=1e-3)


def test_the_picture_has_a_line_for_every_number_of_devices() -> None:
    rows = [
        {"workers": workers, "devices": devices, "trials_per_hour": 1000.0 * min(workers, 3 * devices)}
        for devices in (1, 4)
        for workers in (1, 10, 100)
    ]
    image = draw_scale({"storage": "sqlite", "a": {"rows": rows}, "b": {"rows": rows}}, ["a", "b"])
    colours = {colour for _, colour in image.getcolors(1 << 20)}
    assert {(0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)} <= colours
    assert image.width > 2 * 460
