"""What a transaction of a study's storage takes, by one client and by several at once; adds to `service_times.json`.

    python tests/bench/storage_times.py --out tests/bench/service_times.json
    python tests/bench/storage_times.py --storage "postgresql+psycopg://USER@/DATABASE?host=FOLDER" --out ...

Clients are processes that set attributes of a trial each, one after the other, as a search does. All run on this machine, as the
database server does: where there are few processors they are what the rate of many clients is bound by. What a client waited for
a processor that others had is taken off its seconds, see `Stopwatch`; what the server waited is not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import optuna

from qsearch.search.storage import open_storage

__all__ = ["Stopwatch", "keep", "provenance"]

CLIENTS, TRANSACTIONS = (1, 2, 4, 8), 200


def waited(every: bool = False) -> dict[str, float]:
    """Seconds that threads of this process have been ready to run and were not running; of the main thread, or of every one."""
    threads = Path("/proc/self/task").iterdir() if every else [Path(f"/proc/self/task/{os.getpid()}")]
    return {thread.name: int((thread / "schedstat").read_text().split()[1]) / 1e9 for thread in threads}


class Stopwatch:
    """Seconds since it was made, without what the process waited for a processor.

    Args:
        every: Threads share the work evenly, so that the one that waited longest was waited for.
    """

    def __init__(self, every: bool = False) -> None:
        self.every, self.start, self.before = every, time.perf_counter(), waited(every)

    @property
    def seconds(self) -> float:
        """Till now."""
        whole, now = time.perf_counter() - self.start, waited(self.every)
        return max(whole - max(now[name] - self.before.get(name, 0.0) for name in now), 0.0)


def measure_storage(url: str) -> dict[str, Any]:
    """Seconds of single transactions, and how many there are in a second, for so many clients."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        opened = f"sqlite:///{folder}/study.db" if url == "sqlite" else url
        name = f"storage-times-{os.getpid()}"
        optuna.create_study(study_name=name, storage=open_storage(opened, create=True))
        for clients in CLIENTS:
            command = [sys.executable, __file__, "--client", name, "--storage", opened]
            running = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(clients)]
            for one in running:
                assert one.stdout is not None
                one.stdout.readline()
            start = time.perf_counter()
            for one in running:
                assert one.stdin is not None
                one.stdin.write(b"go\n")
                one.stdin.flush()
            lines = [one.stdout.readline() for one in running if one.stdout is not None]
            wall = time.perf_counter() - start
            for one in running:
                one.communicate()
            both = [pair for line in lines for pair in json.loads(line)]
            seconds = sorted(own for own, _ in both)
            # A hundred quantiles.
            kept = [round(seconds[int(i / 100 * len(seconds))], 6) for i in range(100)]
            with_waiting = round(sum(whole for _, whole in both) / len(both), 6)
            rate = round(clients * TRANSACTIONS / wall, 1)
            found[str(clients)] = {"per_second": rate, "seconds": kept, "mean_with_waiting": with_waiting}
        optuna.delete_study(study_name=name, storage=open_storage(opened, create=False))
    return {**provenance(), "clients": found}


def client(url: str, name: str) -> None:
    """Get ready, wait for the word, and print what each transaction took."""
    trial = optuna.load_study(study_name=name, storage=open_storage(url, create=False)).ask()
    trial.set_user_attr("ready", True)
    print("ready", flush=True)
    sys.stdin.readline()
    found = []
    for number in range(TRANSACTIONS):
        watch, start = Stopwatch(), time.perf_counter()
        trial.set_user_attr(f"a{number}", number)
        found.append((watch.seconds, time.perf_counter() - start))
    print(json.dumps(found), flush=True)


def provenance() -> dict[str, Any]:
    """When and on what."""
    load = round(os.getloadavg()[0], 1)
    return {"date": date.today().isoformat(), "machine": f"{os.cpu_count()}-core {platform.machine()} VM", "load": load}


def keep(file: Path, kind: str, name: str, found: dict[str, Any]) -> None:
    """Add what was found to a file."""
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    kept.setdefault(kind, {})[name] = found
    file.write_text(json.dumps(kept, separators=(",", ":"), sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Measure, or be a client."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--storage", default="sqlite", metavar="URL", help="sqlite, for a file of its own, or a URL of SQLAlchemy's"
    )
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="file that what is found is added to")
    options = parser.parse_args()
    if options.client:
        client(options.storage, options.client)
        return
    found = measure_storage(options.storage)
    if options.out:
        keep(options.out, "storages", options.storage.partition(":")[0].partition("+")[0], found)
    print(json.dumps({clients: one["per_second"] for clients, one in found["clients"].items()}))


if __name__ == "__main__":
    main()
