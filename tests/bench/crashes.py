"""Kill a search again and again at random moments, and count what is lost; prints JSON.

    python tests/bench/crashes.py --kills 100 --jobs 1
    python tests/bench/crashes.py --kills 100 --jobs 2 --model demo

A search is begun in a folder of its own with a few trials, so that kernels and tables are there; then it is continued and
killed with SIGKILL, again and again; the last start is left to finish. After every kill the study is read: a trial that was
complete stays as it was, no configuration counts twice, SQLite finds its file whole, every entry of the cache is whole, and
no process of the search is left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from qsearch.search.evaluation.cache_entries import cache_entries, is_entry_whole
from qsearch.search.storage import open_storage

CLI = Path(__file__).parents[2] / "cli.py"
# How long an orphan may take to notice, seconds.
ORPHANS_S = 5.0
MEASURED = (TrialState.COMPLETE, TrialState.PRUNED)


def start(folder: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Begin or continue the search, in a process group of its own."""
    command = [sys.executable, str(CLI), "search", "--model", options.model, "--study", "s", "--budget", str(options.budget)]
    command += ["--jobs", str(options.jobs), "--seed", "1", "--restarts", "0"]
    with (folder / "stderr.txt").open("ab") as stderr:
        return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True)


# Which number of /proc/N/stat, counted from the state of the process.
PARENT, SESSION = 1, 3


def processes_of(field: int, number: int) -> list[int]:
    """Living processes that have this number for their PARENT or SESSION."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[field]) == number and fields[0] != "Z":
            found.append(int(entry.name))
    return found


def kill(process: subprocess.Popen[bytes]) -> None:
    """A process that leads a session, and all that it has started in it."""
    for one in {process.pid, *processes_of(SESSION, process.pid)}:
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    process.wait()


def trials(folder: Path) -> dict[int, tuple[str, Any, str | None]]:
    """Number -> state, values and configuration of what was measured; empty before there is a study."""
    file = folder / "studies" / "s.db"
    if not file.is_file():
        return {}
    storage = open_storage(f"sqlite:///{file}", create=False)
    try:
        if "s" not in optuna.get_all_study_names(storage):
            return {}
        study = optuna.load_study(study_name="s", storage=storage)
        found = study.get_trials(deepcopy=False, states=MEASURED)
        kept = [one for one in found if one.state == TrialState.COMPLETE or "bound" in one.user_attrs]
        return {one.number: (one.state.name, one.values, one.user_attrs.get("config_hash")) for one in kept}
    finally:
        storage.remove_session()
        storage.engine.dispose()


def whole_database(folder: Path) -> bool:
    """What SQLite says of its file."""
    file = folder / "studies" / "s.db"
    if not file.is_file():
        return True
    connection = sqlite3.connect(file)
    try:
        return bool(connection.execute("PRAGMA integrity_check").fetchone() == ("ok",))
    finally:
        connection.close()


def troubles(folder: Path, before: dict[int, Any], session: int) -> tuple[dict[int, Any], dict[str, int]]:
    """What is measured now, and what went wrong since."""
    orphaned = True
    for _ in range(int(ORPHANS_S / 0.1)):
        orphaned = bool(processes_of(SESSION, session))
        if not orphaned:
            break
        time.sleep(0.1)
    database = whole_database(folder)
    found = trials(folder)
    hashes = [one[2] for one in found.values()]
    damaged = [entry for entry in cache_entries(folder / "studies" / "cache") if not is_entry_whole(entry)]
    return found, {
        "lost": sum(found.get(number) != kept for number, kept in before.items()),
        "counted_twice": len(hashes) - len(set(hashes)),
        "damaged_files": len(damaged) + (not database),
        "orphans": int(orphaned),
    }


def campaign(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All kills, and the search that ends it."""
    rng, sums = random.Random(options.seed), dict[str, int]()
    kills = by_itself = 0
    warm = start(folder, argparse.Namespace(**vars(options) | {"budget": 3}))
    warm.wait()
    known, _ = troubles(folder, {}, warm.pid)
    while kills < options.kills:
        process = start(folder, options)
        try:
            process.wait(rng.uniform(0.0, options.longest))
            by_itself += 1
            if process.returncode or by_itself > options.kills:
                said = (folder / "stderr.txt").read_text()[-800:]
                sys.exit(f"the search ended by itself with status {process.returncode}: {said}")
            # Finished before its time: the study shall be larger.
            options.budget += 10
            continue
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        known, found = troubles(folder, known, process.pid)
        sums = {name: sums.get(name, 0) + count for name, count in found.items()}
        print(f"{kills} kills, {len(known)} trials, {sums}", file=sys.stderr, flush=True)
    last = start(folder, options)
    last.wait()
    known, found = troubles(folder, known, last.pid)
    sums = {name: sums.get(name, 0) + count for name, count in found.items()}
    return {
        "model": options.model,
        "jobs": options.jobs,
        "seed": options.seed,
        "kills": kills,
        "finished_before_the_kill": by_itself,
        "budget": options.budget,
        "measured": len(known),
        "last_exit_status": last.returncode,
        **sums,
    }


def run(parser: argparse.ArgumentParser, kill_all: Callable[[Path, argparse.Namespace], dict[str, Any]], kills: int) -> None:
    """Read the command line, kill in a folder that is gone afterwards, and print what came of it."""
    parser.add_argument("--model", default="demo")
    parser.add_argument("--kills", type=int, default=kills)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(kill_all(Path(name), options), indent=1))


def main() -> None:
    """Kill and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--budget", type=int, default=200, help="trials of the study; raised where a search ends before its kill")
    parser.add_argument("--longest", type=float, default=25.0, help="kills come after so many seconds at most, evenly drawn")
    run(parser, campaign, kills=100)


if __name__ == "__main__":
    main()
