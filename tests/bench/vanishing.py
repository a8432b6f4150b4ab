"""Kill what a search works with, again and again at random moments: Dask workers, or devices of an RPC tracker; prints JSON.

    python tests/bench/vanishing.py dask --kills 50
    python tests/bench/vanishing.py rpc --kills 50

A search with two helpers is run in a folder of its own: two workers of a Dask cluster that build and measure, or two devices
under one key. One of them is killed (SIGKILL, with what it has started) and replaced, until that was done so often; a search that
meets its budget before is continued with a larger one. After it all every trial that was seen finished must still be there as it
was, no configuration may count twice, the budget be met to the trial, nothing be left running; no process and no damaged file.
"""

from __future__ import annotations

import argparse
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from crashes import CLI, SESSION, kill, processes_of, run, whole_database
from optuna.trial import TrialState
from workers import finished

from qsearch.errors import StudyError
from qsearch.search.evaluation.cache_entries import cache_entries, is_entry_whole
from qsearch.search.study import load_study

STUDY, KEY = "s", "device"
# Seconds between two kills, at least and at most; a Dask worker opens its model first.
PAUSES_S = {"dask": (8.0, 20.0), "rpc": (1.0, 8.0)}
BUDGET, MORE = 40, 20
HELPERS = 2
ORPHANS_S = 10.0


def start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    """A Python program, in a session of its own."""
    with (folder / "stderr.txt").open("ab") as errors:
        command = [sys.executable, *words]
        return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def wait_for_port(port: int) -> None:
    """Until somebody listens there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        time.sleep(0.2)
    sys.exit(f"nothing listens at port {port}")


def parts(folder: Path, what: str) -> tuple[subprocess.Popen[bytes], Callable[[], subprocess.Popen[bytes]], list[str]]:
    """What does not die, how a helper is started, and the options of a search that works with them."""
    port = free_port()
    place = f"127.0.0.1:{port}"
    if what == "dask":
        first = start(
            folder, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"
        )
        worker = ["-m", "distributed.cli.dask_worker", f"tcp://{place}", "--nthreads", "1", "--no-dashboard"]
        worker += ["--resources", "compile=1 device=1"]
        options = ["--dask", f"tcp://{place}"]
    else:
        first = start(
            folder, "-m", "tvm.exec.rpc_tracker", "--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 1)
        )
        worker = ["-m", "tvm.exec.rpc_server", "--host", "127.0.0.1", "--tracker", place, "--key", KEY]
        options = ["--rpc", place, "--key", KEY, "--target", "portable", "--jobs", str(HELPERS)]
    wait_for_port(port)
    return first, lambda: start(folder, *worker), options


def campaign(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All kills, and what is left after them."""
    rng, begin, url = random.Random(options.seed), time.monotonic(), f"sqlite:///{folder}/studies/{STUDY}.db"
    first, helper, how = parts(folder, options.what)
    helpers = [helper() for _ in range(HELPERS)]
    sessions = [first.pid, *(one.pid for one in helpers)]
    # Until they can be asked for; a Dask worker takes longest.
    time.sleep(10)
    budget, kills, lost, searches, seen = BUDGET, 0, 0, 0, dict[int, Any]()
    status = 0
    try:
        while kills < options.kills and status == 0:
            words = ["search", "--model", options.model, "--study", STUDY, "--storage", url, "--budget", str(budget), *how]
            search = start(folder, str(CLI), *words, "--sampler", "random", "--restarts", "0")
            sessions.append(search.pid)
            searches += 1
            while search.poll() is None:
                time.sleep(rng.uniform(*PAUSES_S[options.what]))
                now = _finished(url)
                if not now:
                    continue
                lost += sum(now.get(number) != kept for number, kept in seen.items())
                seen = now
                if kills < options.kills and search.poll() is None:
                    chosen = rng.randrange(HELPERS)
                    kill(helpers[chosen])
                    helpers[chosen] = helper()
                    sessions.append(helpers[chosen].pid)
                    kills += 1
                print(f"{len(now)} of {budget} measured, {kills} kills", file=sys.stderr, flush=True)
            status = search.returncode
            budget += MORE
    finally:
        for one in [*helpers, first]:
            kill(one)
    time.sleep(ORPHANS_S)
    trials = load_study(STUDY, url).study.get_trials(deepcopy=False)
    now = _finished(url)
    hashes = [one[2] for one in now.values()]
    return {
        "what": options.what,
        "model": options.model,
        "seed": options.seed,
        "kills": kills,
        "searches": searches,
        "last_exit_status": status,
        "budget": budget - MORE,
        "measured": len(now),
        "lost": lost + sum(now.get(number) != kept for number, kept in seen.items()),
        "counted_twice": len(hashes) - len(set(hashes)),
        "left_running": sum(one.state == TrialState.RUNNING for one in trials),
        "failed": [str(one.user_attrs.get("error"))[:160] for one in trials if one.state == TrialState.FAIL],
        "orphans": sum(bool(processes_of(SESSION, session)) for session in sessions),
        "damaged_files": sum(not is_entry_whole(one) for one in cache_entries(folder / "studies" / "cache"))
        + (not whole_database(folder)),
        "errors": [line for line in (folder / "stderr.txt").read_text().splitlines() if line.startswith("error")],
        "seconds": time.monotonic() - begin,
    }


def _finished(url: str) -> dict[int, tuple[str, Any, str]]:
    try:
        return finished(url, STUDY)
    except StudyError:
        return {}


def main() -> None:
    """Kill and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(PAUSES_S))
    run(parser, campaign, kills=50)


if __name__ == "__main__":
    main()
