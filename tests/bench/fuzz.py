"""Read files that a coverage-guided fuzzer makes up, and count what goes wrong; prints JSON.

    python tests/bench/fuzz.py --runs 100000                     every kind of file
    python tests/bench/fuzz.py --targets spaces,images --seconds 600 --corpus DIR

Needs the extra `bench` (Atheris, libFuzzer for Python). Each kind of file of `tests/hostile_files.py` has a process of its own,
in which this project, PyYAML, Pillow and Python's zipfile tell which branches were taken. Found is whatever is no error
for people: an exception of another kind, a process that dies, a read of more than 10 s, more than 4 GB of memory. What
was found is kept in --corpus (by default nowhere), and the fuzzer goes on.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

HANG_S, MOST_MB, MOST_BYTES = 10, 4096, 1 << 14
INSTRUMENTED = ["qsearch", "yaml", "PIL", "zipfile", "csv", "numpy.lib.format", "numpy.lib._format_impl", "numpy.lib._npyio_impl"]
# Most of the time a file is written: not on a disk.
MEMORY = Path("/dev/shm")
# Executions, and the longest of them in seconds: kept by the child, whatever ends it.
STATE = struct.Struct("qd")


def fuzz_one(name: str, folder: Path, place: Path, options: list[str]) -> None:
    """Fuzz one kind of file in this process, which ends with it; files are written to `place`."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
        from hostile_files import TARGETS, try_file

        import qsearch.adapt.session  # noqa: F401
    target, found = TARGETS[name], {}
    shared = mmap.mmap(os.open(folder / "state", os.O_RDWR), STATE.size)

    def try_one(data: bytes) -> None:
        start = time.perf_counter()
        try:
            try_file(target, data, place)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)
            own = [one for one in where if f"{os.sep}qsearch{os.sep}" in one.filename] or where
            key = f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}"
            if key not in found:
                found[key] = str(error)[:200]
                (folder / f"found-{len(found)}").write_bytes(data)
                (folder / "found.json").write_text(json.dumps(found))
        count, longest = STATE.unpack_from(shared)
        STATE.pack_into(shared, 0, count + 1, max(longest, time.perf_counter() - start))

    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *options, str(corpus)], try_one)
    atheris.Fuzz()


def fuzz(name: str, runs: int, seconds: int, seed: int, folder: Path) -> dict[str, Any]:
    """Fuzz one kind of file until so many runs are made or so much time has passed, however often the process dies.

    Returns:
        executions, seconds, slowest_s, exceptions: kind and place -> message; deaths: how a process ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state").write_bytes(bytes(STATE.size))
    start, deaths = time.monotonic(), []
    while True:
        count, _ = STATE.unpack((folder / "state").read_bytes())
        left = seconds - (time.monotonic() - start)
        if count >= runs or left < 1 or len(deaths) >= 20:
            break
        options = [f"-runs={runs - count}", f"-max_total_time={int(left)}", f"-timeout={HANG_S}", f"-rss_limit_mb={MOST_MB}"]
        options += [
            f"-max_len={MOST_BYTES}",
            f"-seed={seed + len(deaths)}",
            f"-artifact_prefix={folder}{os.sep}",
            "-verbosity=0",
            "-close_fd_mask=3",
        ]
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else folder) as place:
            command = [sys.executable, __file__, "--child", name, "--corpus", str(folder), "--place", place, *options]
            done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode == 0:
            break
        words = [line for line in done.stderr.decode("utf-8", "replace").splitlines() if "ERROR" in line or "Error" in line]
        deaths.append(f"exit status {done.returncode}: {(words or ['nothing was said'])[-1][:300]}")
    count, longest = STATE.unpack((folder / "state").read_bytes())
    exceptions = json.loads((folder / "found.json").read_text()) if (folder / "found.json").exists() else {}
    took = time.monotonic() - start
    return {
        "executions": count,
        "seconds": round(took, 1),
        "slowest_s": round(longest, 3),
        "exceptions": exceptions,
        "deaths": deaths,
    }


def main() -> int:
    """Entry point; 1 if something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="", help="kinds of files, by comma; all unless given")
    parser.add_argument("--runs", type=int, default=10_000, help="executions of each kind")
    parser.add_argument("--seconds", type=int, default=3600, help="longest time for each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, help="folder for inputs that reached something new, and what was found")
    for hidden in ("--child", "--place"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    given, options = parser.parse_known_args()
    if given.child:
        fuzz_one(given.child, given.corpus, Path(given.place), options)
    from hostile_files import TARGETS

    names = given.targets.split(",") if given.targets else list(TARGETS)
    if options or (unknown := [name for name in names if name not in TARGETS]):
        parser.error(f"unknown: {', '.join(options or unknown)}; there are {', '.join(TARGETS)}")
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            folder = (given.corpus or Path(scratch)) / name.replace(" ", "-")
            results[name] = fuzz(name, given.runs, given.seconds, given.seed, folder)
            print(name, json.dumps(results[name]), file=sys.stderr)
    wrong = sum(len(one["exceptions"]) + len(one["deaths"]) for one in results.values())
    total = sum(one["executions"] for one in results.values())
    print(json.dumps({"executions": total, "wrong": wrong, "seed": given.seed, "targets": results}, indent=2))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
