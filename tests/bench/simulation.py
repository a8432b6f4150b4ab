"""How a search would scale: a simulation of many workers and devices from measured service times; prints JSON.

    python tests/bench/simulation.py --workload demo,small --plot scale.png
    python tests/bench/simulation.py --workload small --workers 1,4,16 --devices 1,4 --storage postgresql --deaths-per-hour 0.5

Nothing here runs a search: it is what the queues of one would do. A worker asks for a trial (a study gives out one at a time,
so asking excludes all others), builds its module, waits for a device, times the module there, scores it on processors of its
own, and tells. Unless `--serial`, it asks for and builds the next one meanwhile, as `search` does. Every transaction waits for
the storage. A worker that dies leaves its trials running; the study notices when its heartbeat has been missing for a while and
tries each once more, as `search` does.

Times are drawn, trial by trial, from those that `service_times.py` measured; `service_times.json` says when and on what. Not in
it: that asking takes longer the more trials a study has, that proposals made side by side know less of each other, that workers
may share processors, and the network between them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from farm import Farm, simulate

MEASURED = Path(__file__).with_name("service_times.json")
WORKERS, DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000), (1, 4, 16, 64, 1000)


def measured_farm(measured: Mapping[str, Any], workload: str, storage: str, **options: Any) -> Farm:
    """A farm of the measured service times; what a trial's steps took of SQLite is taken off them."""
    work, clients = measured["workloads"][workload], measured["storages"][storage]["clients"]
    own = measured["storages"]["sqlite"]["clients"]["1"]["seconds"]
    counts = {step: round(work["transactions"][step]) for step in ("ask", "tell")}
    waited = {step: count * sum(own) / len(own) for step, count in counts.items()}
    rows = [{step: max(seconds - waited.get(step, 0.0), 0.0) for step, seconds in row.items()} for row in work["rows"]]
    alone = clients["1"]["seconds"]
    # How many times the rate of one client the storage reaches; both were measured with whatever else was running.
    lanes = max(1, round(max(one["per_second"] for one in clients.values()) * clients["1"]["mean_with_waiting"]))
    return Farm(rows=rows, storage_s=alone, lanes=lanes, transactions=(counts["ask"], counts["tell"]), **options)


def validation(measured: Mapping[str, Any], workload: str) -> dict[str, Any] | None:
    """The one point that can be compared: a worker of two processes with a device, against a search by `search`."""
    if workload not in measured.get("searches", {}):
        return None
    farm = measured_farm(measured, workload, "sqlite", workers=1, devices=1)
    rate, real = simulate(farm).report()["trials_per_hour"] / 60, measured["searches"][workload]
    error = round(100 * (rate / real["trials_per_minute"] - 1), 1)
    return {"simulated_per_minute": round(rate, 1), "measured": real, "error_pct": error}


def numbers(text: str) -> list[int]:
    """Of an option."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Simulate a grid of workers and devices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="demo,small", help="of service_times.json, comma between")
    parser.add_argument("--storage", default="sqlite", help="of service_times.json")
    parser.add_argument("--workers", type=numbers, default=list(WORKERS), help="comma between")
    parser.add_argument("--devices", type=numbers, default=list(DEVICES), help="comma between")
    parser.add_argument("--deaths-per-hour", type=float, default=0.0, help="of each worker")
    parser.add_argument("--serial", action="store_true", help="a worker does one thing after the other")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="PNG file")
    options = parser.parse_args()
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    report: dict[str, Any] = {"simulated": True, "storage": options.storage, "deaths_per_hour": options.deaths_per_hour}
    for workload in options.workload.split(","):
        rows = []
        for devices in options.devices:
            for workers in (count for count in options.workers if count >= devices or count == max(options.workers)):
                shared = {"deaths_per_s": options.deaths_per_hour / 3600, "pipelined": not options.serial}
                farm = measured_farm(measured, workload, options.storage, workers=workers, devices=devices, **shared)
                rows.append(simulate(farm, options.seed).report())
        source = {name: measured["workloads"][workload][name] for name in ("date", "machine")}
        report[workload] = {"measured_on": source, "validation": validation(measured, workload), "rows": rows}
    print(json.dumps(report, indent=1))
    if options.plot:
        from simulation_plot import draw_scale

        draw_scale(report, options.workload.split(",")).save(options.plot, format="PNG")


if __name__ == "__main__":
    main()
