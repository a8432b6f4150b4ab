"""A search on a Dask cluster: a scheduler and workers started from the command line, one of them killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from image_folders import write_classes
from optuna.trial import FrozenTrial
from real_search import SMALL, command, refused, start
from rpc_devices import KEY, devices, tracker

from qsearch.config import QuantConfig
from qsearch.errors import QSearchError, StudyError
from qsearch.measure.devices.rpc import free_devices, open_tracker
from qsearch.search.evaluation.dask_crew import DaskCrew, Errand, connect
from qsearch.search.evaluation.evaluator import Settings
from qsearch.search.study import load_study
from qsearch.search.study_trials import measured_trials

pytest.importorskip("distributed", reason="needs the extra `dask`")
ON_CLUSTER = (*SMALL, "--sampler", "random", "--budget", "8", "--restarts", "0", "--json")


class Cluster:
    """A scheduler and its workers, as processes.

    Args:
        folder: Where they run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[str]] = []
        self.address = self.start("scheduler", "--port", "0", "--host", "127.0.0.1", "--no-dashboard", until=r"(tcp://\S+:\d+)")

    def start(self, *arguments: str, until: str) -> str:
        """Start a program of Dask; what it says of itself."""
        paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "distributed.cli.dask_" + arguments[0], *arguments[1:]],
            cwd=self.folder,
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self.processes.append(process)
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(until, line):
                return found[found.lastindex or 0]
        raise AssertionError(f"dask {arguments[0]} ended with status {process.wait()}")

    def worker(self, **resources: int) -> subprocess.Popen[str]:
        """Start a worker."""
        offered = ",".join(f"{name}={count}" for name, count in resources.items())
        options = ["--nthreads", "1", "--no-dashboard", "--no-nanny", *(["--resources", offered] if offered else [])]
        self.start("worker", self.address, *options, until="Registered to")
        return self.processes[-1]

    def close(self) -> None:
        """End all of them."""
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A scheduler without workers, beside a folder of images."""
    write_classes(tmp_path / "data")
    found = Cluster(tmp_path)
    yield found
    found.close()


def measured(folder: Path) -> dict[str, Any]:
    """Configuration -> digest of the outputs that it was scored by."""
    trials = measured_trials(load_study("small", f"sqlite:///{folder}/studies/small.db").study)
    return {one.user_attrs["config_hash"]: outputs_of(one) for one in trials}


def seen(folder: Path) -> bool:
    """Whether a trial is measured."""
    try:
        return bool(measured(folder))
    except QSearchError:
        return False


def outputs_of(trial: FrozenTrial) -> str:
    """Digest of a trial's outputs."""
    return str(trial.user_attrs["measurement"]["accuracy"]["output_sha256"])


@pytest.mark.slow
def test_a_cluster_measures_what_one_process_measures_though_a_worker_is_killed(tmp_path: Path, cluster: Cluster) -> None:
    doomed = cluster.worker(compile=1, device=1)
    cluster.worker(compile=1, device=1)
    search = start(tmp_path, *ON_CLUSTER, "--dask", cluster.address)
    while search.poll() is None and not seen(tmp_path):
        time.sleep(0.05)
    doomed.send_signal(signal.SIGKILL)
    out, err = search.communicate(timeout=300)
    assert search.returncode == 0, err
    document = json.loads(out)
    assert document["trials"]["complete"] == 8 and document["trials"]["failed"] == 0
    write_classes(tmp_path / "serial" / "data")
    assert command(tmp_path / "serial", *ON_CLUSTER, "--jobs", "1").returncode == 0
    assert measured(tmp_path) == measured(tmp_path / "serial")


@pytest.mark.slow
def test_a_worker_that_dies_while_it_opens_the_model_is_not_waited_for(tmp_path: Path, cluster: Cluster) -> None:
    doomed = cluster.worker(compile=1, device=1)
    cluster.worker(compile=1, device=1)
    search = start(tmp_path, *ON_CLUSTER, "--dask", cluster.address)
    assert search.stderr is not None
    while "open the model" not in (line := search.stderr.readline()):
        assert line, "it ended"
    doomed.send_signal(signal.SIGKILL)
    out, err = search.communicate(timeout=300)
    assert search.returncode == 0, err
    assert json.loads(out)["trials"]["complete"] == 8


@pytest.mark.slow
def test_a_scheduler_that_dies_ends_the_search_and_loses_nothing(tmp_path: Path, cluster: Cluster) -> None:
    cluster.worker(compile=1, device=1)
    search = start(tmp_path, *ON_CLUSTER, "--budget", "60", "--dask", cluster.address)
    while search.poll() is None and not seen(tmp_path):
        time.sleep(0.05)
    cluster.processes[0].kill()
    out, err = search.communicate(timeout=300)
    assert search.returncode == 1 and out == "", err
    messages = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, err
    (message,) = messages
    assert "the Dask cluster is gone" in message and 'Traceback (most recent call last):\n  File "/' not in err.split(message)[1]
    kept = measured(tmp_path)
    assert kept
    again = command(tmp_path, *SMALL, "--sampler", "random", "--budget", str(len(kept) + 1), "--jobs", "1", "--json")
    assert again.returncode == 0, again.stderr
    assert kept.items() <= measured(tmp_path).items()


@pytest.mark.slow
def test_a_scheduler_given_up_between_two_trials_is_told_as_any_that_is_gone(tmp_path: Path, cluster: Cluster) -> None:
    cluster.worker(compile=1, device=1)
    settings = Settings(model="small", data=tmp_path / "data", cache_dir=tmp_path / "cache")
    crew = DaskCrew(cluster.address, Errand(settings.to_json(), {}, {}, str(tmp_path / "lane")), lambda clause: None)
    crew._client, _ = connect(cluster.address)
    assert crew.width() == 2
    cluster.processes[0].kill()
    given_up = time.monotonic() + 60
    while crew._client.status != "closed":
        assert time.monotonic() < given_up, "the client is still waiting for its scheduler"
        time.sleep(0.1)
    with pytest.raises(StudyError, match="the Dask cluster is gone"):
        crew.submit(QuantConfig(), None)
    with pytest.raises(StudyError, match="the Dask cluster is gone"):
        crew.width()


@pytest.mark.slow
def test_a_cluster_builds_for_the_devices_of_a_tracker(tmp_path: Path, cluster: Cluster) -> None:
    pytest.importorskip("tornado", reason="TVM's tracker needs tornado")
    # What one builds another brings to a device.
    cluster.worker(compile=1)
    cluster.worker(device=1)
    cluster.worker(device=1)
    taken = set()
    with tracker() as address, devices(address, 2, 2):
        where = ("--rpc", address.shown, "--key", KEY, "--target", "portable", "--dask", cluster.address)
        search, asked = start(tmp_path, *ON_CLUSTER, *where), open_tracker(address)
        while search.poll() is None:
            taken.add(2 - free_devices(asked.summary(), KEY))
            time.sleep(0.05)
    out, err = search.communicate()
    assert search.returncode == 0, err
    document = json.loads(out)
    assert document["trials"]["complete"] == 8 and document["trials"]["failed"] == 0 and KEY in document["device"]
    assert document["figures"]["latency_ms"] == "measured"
    assert 2 in taken, "one at a time"
    write_classes(tmp_path / "serial" / "data")
    assert command(tmp_path / "serial", *ON_CLUSTER, "--jobs", "1").returncode == 0
    # Integers are the same bits wherever they are computed; what is in float here is for another processor.
    assert measured(tmp_path).keys() == measured(tmp_path / "serial").keys()


@pytest.mark.slow
def test_a_cluster_builds_and_scores_for_a_device_that_is_not_here(tmp_path: Path, cluster: Cluster) -> None:
    cluster.worker(compile=1)
    cluster.worker(device=1)
    packed = command(tmp_path, "pack", *SMALL[1:5], "--target", "portable", "--tiles", "1", "--out", "kernels.pack")
    assert packed.returncode == 0, packed.stderr
    assert command(tmp_path, "measure-pack", "kernels.pack", "--out", "table.json").returncode == 0
    search = command(tmp_path, *ON_CLUSTER, "--dask", cluster.address, "--cost-table", "table.json")
    assert search.returncode == 0, search.stderr
    document = json.loads(search.stdout)
    assert document["trials"]["complete"] == 8
    assert {point["latency_source"] for point in document["front"]} == {"modelled"}


@pytest.mark.slow
def test_what_a_cluster_may_lack(tmp_path: Path, cluster: Cluster) -> None:
    search = (*ON_CLUSTER, "--dask")
    refused(command(tmp_path, *search, cluster.address), 2, "'compile': 0, 'device': 0", "--resources compile=1")
    refused(command(tmp_path, *search, "tcp://127.0.0.1:9"), 2, "no Dask scheduler answers")
    refused(command(tmp_path, *search, cluster.address, "--jobs", "2"), 2, "leave out --jobs")
