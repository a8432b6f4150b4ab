"""Two machines at one study against one: trials per minute of a Dask cluster, prints JSON. Needs root, for network namespaces.

    sudo python tests/bench/two_machines.py --rounds 3

Each machine is a network namespace with an address, a /tmp and half a processor of its own (the kernel's bandwidth control, both
on the first processor); sockets lead from one to another, and a folder that all see, as of a file server, holds model, images
and kernels. A worker on each builds and measures; scheduler and search have the second processor to themselves. The study is
build-bound: 40 convolutions, no two alike, on 16x16 pixels and 20 images. Rounds of one machine and two take turns, each with
kernels of its own, none at the beginning.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from crashes import CLI, kill
from optuna.trial import TrialState
from PIL import Image

from qsearch.errors import StudyError
from qsearch.search.study import load_study

STUDY, PORT, CLASSES = "s", 8786, 2
SCHEDULER = "10.77.0.1"
ADDRESSES = {"qsearch-a": "10.77.0.2", "qsearch-b": "10.77.0.3"}
BRIDGE = "qsearch-br"
# Of a machine: microseconds of a processor in so many.
QUOTA_US, PERIOD_US = 50_000, 100_000
# Where scheduler and search run.
ASIDE = ("taskset", "-c", "1")
NETWORK = """
import torch
from torch import nn

PREPROCESSING = {"resize": None, "crop": [16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "channels": 3}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        widths = [3, *(8 + 4 * (index % 20) + index // 20 for index in range(40))]
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in zip(widths, widths[1:]))
        self.head = nn.Linear(widths[-1], 2)

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x = torch.relu(layer(x))
            if index in (3, 7):
                x = torch.nn.functional.max_pool2d(x, 2)
        return self.head(x.mean((2, 3)))
"""


def ip(*words: str) -> None:
    """iproute2."""
    subprocess.run(["ip", *words], check=True)


@contextmanager
def machines() -> Iterator[None]:
    """Two namespaces on a bridge that has the scheduler's address."""
    with ExitStack() as undo:
        ip("link", "add", BRIDGE, "type", "bridge")
        undo.callback(ip, "link", "del", BRIDGE)
        ip("addr", "add", f"{SCHEDULER}/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for name, address in ADDRESSES.items():
            ip("netns", "add", name)
            undo.callback(ip, "netns", "del", name)
            here = f"{name}-h"
            ip("link", "add", here, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", here, "master", BRIDGE, "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield


@contextmanager
def processors() -> Iterator[dict[str, Path]]:
    """A control group for each machine: its name -> where processes are written that are to belong to it."""
    first = Path("/sys/fs/cgroup/cpu")
    found = {}
    with ExitStack() as undo:
        for name in ADDRESSES:
            group = (first if first.is_dir() else first.parent) / name
            group.mkdir()
            undo.callback(group.rmdir)
            if first.is_dir():
                (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (group / "cpu.cfs_quota_us").write_text(str(QUOTA_US))
            else:
                (group / "cpu.max").write_text(f"{QUOTA_US} {PERIOD_US}")
            found[name] = group / "cgroup.procs"
        yield found


def start(folder: Path, *command: str) -> subprocess.Popen[bytes]:
    """A program in a session of its own."""
    with (folder / "stderr.txt").open("ab") as errors:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(CLI.parent)])}
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": errors}
        return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **quiet)


def worker(folder: Path, name: str, group: Path) -> subprocess.Popen[bytes]:
    """A machine's worker."""
    dask = f"{sys.executable} -m distributed.cli.dask_worker tcp://{SCHEDULER}:{PORT} --nthreads 1 --no-dashboard --no-nanny"
    words = f"mount -t tmpfs tmpfs /tmp && exec taskset -c 0 {dask} --resources 'compile=1 device=1'"
    process = start(folder, "ip", "netns", "exec", name, "unshare", "--mount", "sh", "-c", words)
    group.write_text(str(process.pid))
    return process


def lay_out(folder: Path, seed: int) -> None:
    """A network and images."""
    (folder / "deep.py").write_text(NETWORK)
    rng = np.random.default_rng(seed)
    for index in range(20):
        place = folder / "data" / str(index % CLASSES)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(place / f"{index}.png")


def measured(place: Path, groups: dict[str, Path], budget: int, seed: int) -> dict[str, Any]:
    """A search on some machines."""
    url = f"sqlite:///{place}/studies/{STUDY}.db"
    lay_out(place, seed)
    with ExitStack() as undo:
        python = [
            sys.executable,
            "-m",
            "distributed.cli.dask_scheduler",
            "--host",
            SCHEDULER,
            "--port",
            str(PORT),
            "--no-dashboard",
        ]
        undo.callback(kill, start(place, *ASIDE, *python))
        for name, group in groups.items():
            undo.callback(kill, worker(place, name, group))
        time.sleep(10)
        words = ["search", "--model", "deep:Net", "--data", "data", "--study", STUDY, "--storage", url, "--sampler", "random"]
        words += ["--budget", str(budget), "--seed", str(seed), "--dask", f"tcp://{SCHEDULER}:{PORT}", "--no-early-stopping"]
        search = start(place, *ASIDE, sys.executable, str(CLI), *words, "--restarts", "0")
        undo.callback(kill, search)
        if search.wait():
            sys.exit((place / "stderr.txt").read_text()[-2000:])
    try:
        trials = load_study(STUDY, url).study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    except StudyError as error:
        sys.exit(str(error))
    # From the first trial's beginning to the last's end, kernels that are missing at first included. Workers, and the float
    # module, are got ready before.
    begins = [one.datetime_start for one in trials if one.datetime_start is not None]
    ends = [one.datetime_complete for one in trials if one.datetime_complete is not None]
    stages: dict[str, float] = {}
    for one in trials:
        for stage, seconds in one.user_attrs["measurement"]["seconds"].items():
            stages[stage] = stages.get(stage, 0.0) + seconds / len(trials)
    return {
        "machines": len(groups),
        "trials": len(trials),
        "trials_per_minute": len(trials) / (max(ends) - min(begins)).total_seconds() * 60,
        "seconds_of_a_trial": stages,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=40)
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("two machines are network namespaces, which only root can make: run this with sudo")
    runs = []
    # Not under /tmp, which every machine has for itself.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name, machines(), processors() as groups:
        for turn in range(options.rounds):
            for count in (1, 2):
                place = Path(name) / f"{turn}-{count}"
                place.mkdir()
                runs.append(measured(place, dict(list(groups.items())[:count]), options.budget, turn))
                print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    rates = [[run["trials_per_minute"] for run in runs if run["machines"] == count] for count in (1, 2)]
    ratios = [two / one for one, two in zip(*rates, strict=True)]
    print(json.dumps({"ratio_median": statistics.median(ratios), "ratios": ratios, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
