"""Many workers at one study, some of them killed, its server restarted under them; prints JSON.

    python tests/bench/workers.py --workers 8 --budget 500
    python tests/bench/workers.py --workers 3 --budget 300 --kills 50
    python tests/bench/workers.py --workers 3 --budget 300 --server-restarts 50
    python tests/bench/workers.py --overhead

The study lies on a PostgreSQL server of this script's own, or with --sqlite in a file. A search begins it; workers join, and
a killed one (SIGKILL, at a random moment) is replaced. The server is stopped as a crash would. After it all every trial that was
seen finished must still be there as it was, no configuration may count twice, the budget be met to the trial, nothing be left
running and no process be left. --overhead times what a trial costs besides its measurement, on a network whose measurements are
formulas: asking, attributes and telling, in a file and on the server, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import optuna

sys.path.insert(0, str(Path(__file__).parents[1]))

from analytic import AnalyticEvaluator
from crashes import MEASURED, SESSION, processes_of
from optuna.trial import TrialState
from postgres import Postgres, running_postgres

from qsearch.errors import StudyError
from qsearch.search.bound_space import bind_space
from qsearch.search.loop.driver import Limits, SearchProblem, run_search
from qsearch.search.samplers import make_sampler
from qsearch.search.space import load_space
from qsearch.search.study import Identity, load_study, study_to_search

CLI = Path(__file__).parents[2] / "cli.py"
STUDY = "shared"
# Seconds between two kills or restarts, at least and at most.
PAUSE_S = (1.0, 6.0)
ROUNDS, TRIALS = 5, 60


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A command of qsearch, in a session of its own."""
    command = [sys.executable, str(CLI), *arguments, "--study", STUDY, "--jobs", "1", "--restarts", "0"]
    with (folder / "stderr.txt").open("ab") as stderr:
        return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True)


def finished(url: str, study: str = STUDY) -> dict[int, tuple[str, Any, str]]:
    """Number -> state, values and configuration of what is measured."""
    found = load_study(study, url).study.get_trials(deepcopy=False, states=MEASURED)
    kept = [one for one in found if one.state == TrialState.COMPLETE or "bound" in one.user_attrs]
    return {one.number: (one.state.name, one.values, one.user_attrs["config_hash"]) for one in kept}


def campaign(folder: Path, url: str, server: Postgres | None, options: argparse.Namespace) -> dict[str, Any]:
    """The whole of it."""
    rng, begin = random.Random(options.seed), time.monotonic()
    os.environ["QSEARCH_STORAGE"] = url
    search = start(folder, "search", "--model", options.model, "--sampler", "random", "--budget", str(options.budget))
    members = [search]
    while search.poll() is None and not begun(url):
        time.sleep(0.5)
    members += [start(folder, "worker") for _ in range(options.workers - 1)]
    sessions = [one.pid for one in members]
    while search.poll() is None and len(_at_work(url)) < options.workers:
        time.sleep(0.5)
    seen: dict[int, Any] = {}
    lost = kills = restarts = 0
    while any(one.poll() is None for one in members):
        time.sleep(rng.uniform(*PAUSE_S))
        now = finished(url)
        lost += sum(now.get(number) != kept for number, kept in seen.items())
        seen = now
        print(f"{len(now)} measured, {kills} kills, {restarts} restarts of the server", file=sys.stderr, flush=True)
        alive = [one for one in members[1:] if one.poll() is None]
        if kills < options.kills and alive:
            chosen = rng.choice(alive)
            os.kill(chosen.pid, signal.SIGKILL)
            chosen.wait()
            kills += 1
            members = [one for one in members if one is not chosen] + [start(folder, "worker")]
            sessions.append(members[-1].pid)
        if restarts < options.server_restarts and server is not None and search.poll() is None:
            server.stop()
            time.sleep(rng.uniform(0.0, 2.0))
            server.start()
            restarts += 1
    now = finished(url)
    trials = load_study(STUDY, url).study.get_trials(deepcopy=False)
    hashes = [one[2] for one in now.values()]
    return {
        "model": options.model,
        "storage": "sqlite" if server is None else "postgresql",
        "workers": options.workers,
        "seed": options.seed,
        "budget": options.budget,
        "measured": len(now),
        "by_process": sorted(
            (sum(_process(one) == pid for one in trials if one.number in now) for pid in _processes(trials)), reverse=True
        ),
        "kills": kills,
        "server_restarts": restarts,
        "lost": lost + sum(now.get(number) != kept for number, kept in seen.items()),
        "counted_twice": len(hashes) - len(set(hashes)),
        "left_running": sum(one.state == TrialState.RUNNING for one in trials),
        "tried_again": sum("retry_of" in one.user_attrs for one in trials),
        "duplicates_recognised": sum("duplicate_of" in one.user_attrs for one in trials),
        "orphans": sum(bool(processes_of(SESSION, session)) for session in sessions),
        "exit_statuses": [one.returncode for one in members],
        "errors": [line for line in (folder / "stderr.txt").read_text().splitlines() if line.startswith("error")],
        "seconds": time.monotonic() - begin,
    }


def begun(url: str) -> bool:
    """Whether the search has a trial."""
    try:
        return bool(load_study(STUDY, url).study.get_trials(deepcopy=False))
    except StudyError:
        return False


def _at_work(url: str) -> set[int]:
    """The processes that have begun a trial so far."""
    return _processes(load_study(STUDY, url).study.get_trials(deepcopy=False))


def _process(trial: optuna.trial.FrozenTrial) -> int | None:
    return trial.user_attrs.get("member", {}).get("process")


def _processes(trials: list[optuna.trial.FrozenTrial]) -> set[int]:
    return {found for one in trials if (found := _process(one)) is not None}


def overhead(folder: Path, url: str) -> dict[str, Any]:
    """Milliseconds of a trial whose measurement takes none, in a file and on a server, medians over rounds."""
    evaluator = AnalyticEvaluator(35)
    space = bind_space(load_space("default"), evaluator.graph)
    found: dict[str, list[float]] = {"sqlite": [], "postgresql": []}
    for turn in range(ROUNDS):
        for name, place in (("sqlite", f"sqlite:///{folder}/a.db"), ("postgresql", url)):
            with study_to_search(f"overhead-{turn}", Identity({"model": "a"}), place) as handle:
                handle.study.sampler = make_sampler("random", turn, 0)
                begin = time.monotonic()
                run_search(handle, SearchProblem(space, evaluator.evaluate, anchored=False), Limits(TRIALS))
                found[name].append(1e3 * (time.monotonic() - begin) / TRIALS)
    medians = {f"{name}_ms_per_trial": statistics.median(times) for name, times in found.items()}
    return {"layers": 35, "rounds": ROUNDS, "trials": TRIALS, **medians}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--workers", type=int, default=8, help="processes, the search among them")
    parser.add_argument("--budget", type=int, default=500)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--server-restarts", type=int, default=0)
    parser.add_argument("--sqlite", action="store_true", help="in a file instead of on a server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overhead", action="store_true", help="only time what a trial costs besides its measurement")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, nullcontext() if options.sqlite else running_postgres() as server:
        folder = Path(name)
        url = f"sqlite:///{folder}/shared.db" if server is None else server.url
        document = overhead(folder, url) if options.overhead else campaign(folder, url, server, options)
        print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
