"""Resident memory of a long search, trial by trial: does any of its processes grow? Prints JSON.

    python tests/bench/memory_growth.py --trials 500
    python tests/bench/memory_growth.py --trials 200 --model efficientnet_lite0 --data DIR --space full

A search runs as a user starts it, in a folder of its own; of the small network of `small_network.py` if of no other. Whenever
its log tells of a trial, the resident memory of the searching process and of the one that measures is read. Growth is counted
between the trials around the 50th and the last ones, medians of 11 each; caches of a size that the small network bounds are
full by then, those of a larger one need not be.
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
from pathlib import Path
from typing import Any

import small_network
import torch
import yaml
from crashes import PARENT, processes_of

CLI = Path(__file__).parents[2] / "cli.py"
SETTLED, AROUND = 50, 11
POLL_S = 0.02


def start(folder: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Begin the search."""
    if options.cache is not None:
        (folder / "studies").mkdir()
        options.cache.mkdir(parents=True, exist_ok=True)
        (folder / "studies" / "cache").symlink_to(options.cache.absolute())
    command = [sys.executable, str(CLI), "search", *(_small(folder, options) if options.model is None else _given(options))]
    command += ["--study", "s", "--budget", str(options.trials), "--jobs", str(options.jobs)]
    command += ["--log-json", "log", "--sampler", options.sampler]
    command += ["--timeout", str(options.seconds)] if options.seconds else []
    # Where the model is found.
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with (folder / "stderr.txt").open("wb") as stderr:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)


def _small(folder: Path, options: argparse.Namespace) -> list[str]:
    """The small network, trained first if need be, and its space."""
    weights = folder / "weights.safetensors"
    if options.weights is None:
        torch.set_num_threads(1)
        small_network.train(weights)
    else:
        weights = options.weights.absolute()
    (folder / "space.yaml").write_text(
        yaml.safe_dump(small_network.SPACE.model_dump(mode="json", exclude_unset=True)), encoding="utf-8"
    )
    return ["--model", "small_network:build", "--weights", str(weights), "--data", "demo", "--space", "space.yaml"]


def _given(options: argparse.Namespace) -> list[str]:
    """What was asked for."""
    chosen = {"--model": options.model, "--space": options.space}
    # A folder, or the name of images that come with a model.
    chosen["--data"] = options.data if options.data is None or not Path(options.data).exists() else Path(options.data).absolute()
    return [part for name, value in chosen.items() if value is not None for part in (name, str(value))]


def resident(process: int) -> dict[str, int]:
    """Bytes of a process: all that is resident, and what of it is no file's."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {"resident": 0, "anonymous": 0}
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "RssAnon"))}
    return {"resident": 1024 * int(found.get("VmRSS", 0)), "anonymous": 1024 * int(found.get("RssAnon", 0))}


def largest(processes: list[int]) -> int:
    """The one that holds most: helpers of the interpreter are small."""
    return max(processes, key=lambda one: resident(one)["resident"], default=0)


def sampled(folder: Path, search: subprocess.Popen[bytes]) -> dict[str, list[dict[str, int]]]:
    """What each process held at every trial."""
    found: dict[str, list[dict[str, int]]] = {"searching": [], "measuring": []}
    log, seen = folder / "log", 0
    while search.poll() is None:
        time.sleep(POLL_S)
        lines = log.read_bytes().count(b'"event": "trial"') if log.exists() else 0
        if lines == seen:
            continue
        searching = largest(processes_of(PARENT, search.pid))
        measuring = largest(processes_of(PARENT, searching)) if searching else 0
        for name, process in (("searching", searching), ("measuring", measuring)):
            found[name] += [{"process": process, **resident(process)}] * (lines - seen)
        seen = lines
        if seen % 50 == 0:
            told = {name: f"{samples[-1]['resident'] / 1e6:.0f} MB" for name, samples in found.items()}
            print(f"{seen} trials, {told}", file=sys.stderr, flush=True)
    return found


def growth(samples: list[dict[str, int]], key: str) -> dict[str, float]:
    """Megabytes around the 50th trial and at the end, and by how many percent the second is more."""
    half = AROUND // 2
    before = statistics.median(one[key] for one in samples[SETTLED - 1 - half : SETTLED + half])
    after = statistics.median(one[key] for one in samples[-AROUND:])
    return {
        "at_50_mb": round(before / 1e6, 1),
        "at_end_mb": round(after / 1e6, 1),
        "growth_pct": round(100 * (after / before - 1), 2),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Search and report."""
    with tempfile.TemporaryDirectory() as name:
        folder, begun = Path(name), time.monotonic()
        search = start(folder, options)
        found = sampled(folder, search)
        if len(found["searching"]) < SETTLED + AROUND:
            sys.exit(f"the search ended with status {search.returncode}: {(folder / 'stderr.txt').read_text()[-2000:]}")
    report: dict[str, Any] = {"trials": len(found["searching"]), "jobs": options.jobs, "sampler": options.sampler}
    report |= {"model": options.model or "small", "space": options.space}
    report |= {"seconds": round(time.monotonic() - begun, 1), "exit_status": search.returncode}
    for process, samples in found.items():
        # One job: the searching process measures as well.
        if samples[SETTLED]["resident"]:
            report[process] = {key: growth(samples, key) for key in ("resident", "anonymous")}
            report[process]["processes"] = len({one["process"] for one in samples})
            step = max(len(samples) // 20, 1)
            report[process]["resident_mb"] = [round(one["resident"] / 1e6, 1) for one in samples[::step]]
    return report


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--sampler", default="planner")
    parser.add_argument("--seconds", type=float, help="no trial is begun after so long")
    parser.add_argument("--weights", type=Path, help="of the small network, where it was trained before")
    parser.add_argument("--model", help="another network, as `search` takes it")
    parser.add_argument("--data", help="its images")
    parser.add_argument("--space", help="what is searched of it")
    parser.add_argument("--cache", type=Path, help="kernels and images to begin with, studies/cache of another search")
    options = parser.parse_args()
    if options.trials < SETTLED + AROUND:
        parser.error(f"--trials: at least {SETTLED + AROUND}, for there to be something after the first {SETTLED}")
    print(json.dumps(measure(options), indent=1))


if __name__ == "__main__":
    main()
