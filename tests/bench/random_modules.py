"""Random networks under random configurations, compiled and compared with the reference; prints JSON. For the night.

python tests/bench/random_modules.py --count 1000 --json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from random_networks import differences

from qsearch.build.cache import KernelCache
from qsearch.build.link import Linker
from qsearch.build.target import open_target


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--target", default="host")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a sentence")
    options = parser.parse_args()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        target = open_target(options.target)
        for done, seed in enumerate(range(options.first, options.first + options.count), 1):
            # Kernels are of so many shapes that keeping them would only take memory.
            wrong += differences(Linker(KernelCache(Path(name) / str(done % 50), target)), seed)
            if done % 50 == 0:
                print(f"{done} networks, {len(wrong)} differences", file=sys.stderr, flush=True)
    if options.json:
        print(
            json.dumps(
                {"target": target.description, "first": options.first, "networks": options.count, "wrong": wrong}, indent=1
            )
        )
    else:
        print("\n".join([f"{options.count} networks, {len(wrong)} differences", *wrong]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
