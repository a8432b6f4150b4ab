"""Devices over RPC: a real tracker and a real server on this machine, and what is said when they are not there."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState
from packs import programs
from real_search import SMALL, fails, start, trials, within
from rpc_devices import KEY, devices, free_port, tracker

from qsearch.build.target import open_target
from qsearch.errors import MeasureError, UsageError
from qsearch.measure.devices.device import Prepared
from qsearch.measure.devices.rpc import RpcAddress, RpcDevice, free_devices, open_tracker, parse_address, registered_keys
from qsearch.measure.devices.rpc import within as bounded
from qsearch.measure.devices.rpc_away import RpcAway
from qsearch.measure.latency import TimingSettings
from qsearch.measure.measurement import Memory
from qsearch.search.members import MEMBER

MODEL = SMALL[1:5]


@pytest.fixture(scope="module")
def address() -> Iterator[RpcAddress]:
    """A tracker that has one device."""
    pytest.importorskip("tornado", reason="TVM's tracker needs tornado")
    with tracker() as found, devices(found, 1, 1):
        yield found


def test_modules_and_kernels_are_timed_there(address: RpcAddress, tmp_path: Path) -> None:
    away = RpcAway(address, open_target("portable"), tmp_path)
    in_float, in_int8 = programs("residual", "fp32", "int8")
    ready = [
        Prepared(lambda: pytest.fail("opened here"), Memory(0, 0, 0), "", away=away.prepare(one)) for one in (in_float, in_int8)
    ]
    reference, module = (away.device.handle(one) for one in ready)
    image = np.zeros(in_float.input.shape, np.float32)
    alone = away.device.alone(reference, image, TimingSettings(repeats=3))
    assert alone.median_ms > 0 and alone.source == "measured" and alone.ratio is None
    (latency,) = away.device.paired(reference, [module], image, 2 * alone.median_ms)
    assert latency.ratio is not None and latency.median_ms == pytest.approx(2 * alone.median_ms * latency.ratio)
    away.learn([in_int8])
    symbols = {call.symbol for call in away.linker.plan(in_int8).calls}
    assert all((away.seconds(symbol) or 0) > 0 for symbol in symbols)
    assert away.seconds("another") is None


@pytest.mark.slow
def test_a_small_network_is_searched_there(address: RpcAddress, small: Path) -> None:
    where = ("--rpc", address.shown, "--key", KEY, "--target", "portable")
    given = (*SMALL[:6], "--study", "rpc", *where, "--budget", "2", "--sampler", "random", "--no-early-stopping")
    result = within(small, *given, "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert KEY in document["device"] and document["target"] == "portable"
    assert document["figures"]["latency_ms"] == "measured" and document["figures"]["top1_loss_pp"] == "measured on this machine"
    # Starting points that were not reached are still waiting.
    measured = [trial for trial in trials(small, "rpc") if trial.state == TrialState.COMPLETE]
    assert len(measured) == 2
    for trial in measured:
        assert trial.user_attrs["measurement"]["latency"]["ratio"] > 0
    other = (*SMALL[:6], "--study", "rpc", "--target", "portable", "--budget", "2", "--sampler", "random")
    fails(small, 1, ("made by another search", "device was"), *other)


@pytest.mark.slow
def test_two_devices_are_measured_on_side_by_side(address: RpcAddress, small: Path) -> None:
    where = ("--rpc", address.shown, "--key", KEY, "--target", "portable")
    given = (*SMALL[:6], "--study", "pool", *where, "--budget", "16", "--sampler", "random", "--jobs", "2", "--json")
    asked, free = open_tracker(address), set[int]()
    with devices(address, 1, 2):
        search = start(small, *given)
        while search.poll() is None:
            free.add(free_devices(asked.summary(), KEY))
            time.sleep(0.1)
    out, told = search.communicate()
    assert search.returncode == 0, told
    assert json.loads(out)["trials"]["complete"] == 16
    measured = [trial for trial in trials(small, "pool") if trial.state == TrialState.COMPLETE]
    assert len({trial.user_attrs[MEMBER]["process"] for trial in measured}) == 2
    assert free == {0, 1, 2}


def test_a_session_that_breaks_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    device, tried = RpcDevice(RpcAddress("127.0.0.1", 1, KEY)), []
    monkeypatch.setattr(RpcDevice, "_request", lambda self: "session")

    def breaking(times: int) -> Any:
        tried.clear()

        def run(session: str) -> str:
            tried.append(session)
            if len(tried) <= times:
                raise RuntimeError("socket closed")
            return "measured"

        return run

    assert device.session(breaking(1)) == "measured"
    with pytest.raises(MeasureError, match="failed 2 times: socket closed"):
        device.session(breaking(2))
    assert len(tried) == 2


def test_no_device_under_the_key(address: RpcAddress, small: Path) -> None:
    where = ("--rpc", address.shown, "--key", "nobody", "--target", "portable")
    fails(small, 2, ("no device under key 'nobody'", KEY, "tvm.exec.rpc_server"), "evaluate", *MODEL, *where)


def test_no_tracker(small: Path) -> None:
    where = ("--rpc", f"127.0.0.1:{free_port()}", "--key", KEY, "--target", "portable")
    fails(small, 2, ("no RPC tracker answers", "tvm.exec.rpc_tracker"), "evaluate", *MODEL, *where)


def test_a_device_that_fails_or_does_not_answer_fails_the_trial() -> None:
    device = RpcDevice(RpcAddress("127.0.0.1", free_port(), KEY), free_s=0.0)
    with pytest.raises(MeasureError, match="no RPC tracker answers"):
        device.session(lambda session: None)
    with pytest.raises(MeasureError, match="it has not answered for 0 s"):
        bounded(lambda: time.sleep(5), 0.01, "it")
    with pytest.raises(KeyError):
        bounded(lambda: {}["missing"], 5.0, "it")
    assert bounded(lambda: 3, 5.0, "it") == 3


def test_what_a_tracker_says() -> None:
    summary = {
        "queue_info": {"a": {"free": 1, "pending": 0}, "b": {"free": 0, "pending": 2}},
        "server_info": [{"addr": ["127.0.0.1", 9090], "key": "server:a"}, {"addr": ["127.0.0.1", 9091], "key": "server:b"}],
    }
    assert registered_keys(summary) == {"a", "b"}
    assert [free_devices(summary, key) for key in "abc"] == [1, 0, 0]


BAD = {
    "no port": (("--rpc", "somewhere", "--key", KEY, "--target", "portable"), "expected HOST:PORT"),
    "no key": (("--rpc", "somewhere:9190", "--target", "portable"), "--rpc needs --key"),
    "no tracker": (("--key", KEY), "give --rpc"),
    "no target": (("--rpc", "somewhere:9190", "--key", KEY), "--rpc needs --target"),
    "both": (("--rpc", "somewhere:9190", "--key", KEY, "--cost-table", "table.json"), "contradict each other"),
}


@pytest.mark.parametrize("what", BAD)
def test_options_that_cannot_be_carried_out(small: Path, what: str) -> None:
    options, words = BAD[what]
    fails(small, 2, (words,), "evaluate", *MODEL, *options)


def test_an_address() -> None:
    assert parse_address("10.0.0.2:9190", "phone") == RpcAddress("10.0.0.2", 9190, "phone")
    with pytest.raises(UsageError, match="expected HOST:PORT"):
        parse_address("10.0.0.2:99999", "phone")
