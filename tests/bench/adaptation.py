"""What new scales recover under shifts of brightness, contrast, noise and blur, and what recording costs.

    python tests/bench/adaptation.py --json                     all of it, on the built-in classifier
    python tests/bench/adaptation.py --parts recovery,cost

Parts: `recovery` calibrates bundles on images as they are and on shifted ones, serves them others, and adapts by what
their own monitors record, without labels; accuracy is of the modules on held-out images that no step has seen, float the
float module on the same. `cost` runs a monitor and a plain runner in turns. `alarms` draws unshifted images and counts
what drift and proposals there are. `replacing` times the replacement by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from qsearch.calibrate.observe import observe
from qsearch.calibrate.ranges import activation_ranges
from qsearch.config import QuantConfig, named_config
from qsearch.export import runner
from qsearch.export.bundle import Adaptable, BundleContent, write_bundle
from qsearch.export.from_study import recorded_inputs
from qsearch.quantize.lower import lower
from qsearch.quantize.weight_store import WeightStore
from qsearch.search.evaluation.evaluator import Settings
from qsearch.search.evaluation.objective import ModelEvaluator, prepare_evaluator

PARTS = ("recovery", "cost", "alarms", "replacing")
# Images that a monitor records, and held-out images that accuracy is of.
RECORDED, SCORED = 256, 4000
NOISE = np.random.default_rng(1)
# Pixels in 0 to 255 -> pixels, before rounding.
SHIFTS = {
    "none": lambda x: x,
    "brightness 0.25": lambda x: 0.25 * x,
    "brightness 2": lambda x: 2 * x,
    "contrast 0.3": lambda x: 128 + 0.3 * (x - 128),
    "contrast 2": lambda x: 128 + 2 * (x - 128),
    "noise 15": lambda x: x + NOISE.normal(0, 15, x.shape),
    "blur 1": lambda x: gaussian_filter(x, (0, 1, 1, 0)),
}
# Calibrated on -> served.
CASES = [("none", served) for served in SHIFTS if served != "none"]
CASES += [("brightness 0.25", served) for served in ("none", "brightness 2", "contrast 2", "noise 15", "blur 1")]
CASES += [("contrast 0.3", served) for served in ("none", "brightness 0.25", "contrast 2", "noise 15", "blur 1")]


class Bench:
    """The built-in classifier, its images, and bundles calibrated on shifted ones."""

    def __init__(self, folder: Path, precision: str) -> None:
        self.folder, self.config = folder, named_config(precision)
        self.evaluator: ModelEvaluator = prepare_evaluator(Settings(model="demo"), say)
        self.preprocessing = self.evaluator.dataset.preprocessing
        heldout, labels = self.evaluator.images("heldout"), self.evaluator.dataset.labels("heldout")
        pixels = self.preprocessing.pixels_of(heldout)
        self.pixels, self.labels = pixels[:SCORED], labels[:SCORED]
        self.served = pixels[SCORED:]
        self.float = self.evaluator.build(self.evaluator.lower(QuantConfig(default_precision="fp32")))

    def images(self, pixels: np.ndarray, shift: str) -> np.ndarray:
        """Shifted images as the model takes them."""
        moved = np.clip(np.rint(SHIFTS[shift](pixels.astype(np.float64))), 0, 255).astype(np.uint8)
        return runner.normalised(moved, self.preprocessing.to_json())

    def bundle(self, shift: str, copy: str) -> Path:
        """A bundle of its own, calibrated on shifted images."""
        calibration = self.images(self.preprocessing.pixels_of(self.evaluator.images("calibration")), shift)
        model, value_range = self.evaluator.model, self.preprocessing.value_range
        ranges = activation_ranges(observe(model, calibration, 100), model, self.config.calibration, value_range)
        program = lower(model, self.config, ranges, WeightStore())
        recorded, inputs = recorded_inputs(self.evaluator.images("search"), self.preprocessing)
        outputs = self.evaluator.outputs(self.evaluator.build(program), inputs)
        content = BundleContent(
            self.config,
            self.preprocessing.to_json(),
            self.evaluator.dataset.classes,
            {"latency_ms": 0.0},
            recorded,
            outputs,
            adaptable=Adaptable(model, value_range, calibration),
        )
        write_bundle(self.folder / copy, self.evaluator.linker, program, content)
        return self.folder / copy

    def record(self, bundle: Path, images: np.ndarray) -> Path:
        """Statistics of images by the bundle's own monitor."""
        given, found = self.folder / "given.npy", self.folder / "found.npz"
        np.save(given, images)
        alone(bundle / "monitor.py", found, given)
        return found

    def right(self, bundle: Path, images: np.ndarray) -> int:
        """Images that a bundle has right."""
        given, found = self.folder / "scored.npy", self.folder / "outputs.npy"
        np.save(given, images)
        alone(bundle / "run.py", bundle, "outputs", given, found)
        return int((np.load(found).argmax(1) == self.labels).sum())


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def alone(script: Path, *arguments: str | Path) -> str:
    """Run a bundle's script in a process that has TVM's runtime alone."""
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | {"TVM_USE_RUNTIME_LIB": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{script} failed: {done.stdout} {done.stderr}")
    return done.stdout


def recovery(bench: Bench) -> list[dict[str, Any]]:
    """Every case: right in float, before and after; at most so many steps of adaptation as it takes, three at most."""
    from qsearch.adapt.session import adapt_bundle, apply_adaptation

    rows = []
    for number, (calibrated, served) in enumerate(CASES):
        bundle = bench.bundle(calibrated, f"case{number}")
        scored = bench.images(bench.pixels, served)
        row: dict[str, Any] = {"calibrated": calibrated, "served": served, "images": len(scored)}
        row["float"] = int((bench.evaluator.outputs(bench.float, scored).argmax(1) == bench.labels).sum())
        row["before"] = row["after"] = bench.right(bundle, scored)
        row["steps"], row["verdicts"] = 0, []
        for step in range(3):
            recorded = bench.images(bench.served[step * RECORDED : (step + 1) * RECORDED], served)
            found = adapt_bundle(bundle, bench.record(bundle, recorded))
            row["verdicts"].append("no drift" if found.verdict is None else "accepted" if found.verdict.accepted else "refused")
            if found.verdict is None or not found.verdict.accepted:
                break
            apply_adaptation(found)
            row["steps"] += 1
            row["after"] = bench.right(bundle, scored)
            row.setdefault("after_one", row["after"])
        lost = row["float"] - row["before"]
        row["cost_pp"] = 100 * lost / len(scored)
        row["recovered"] = (row["after"] - row["before"]) / lost if lost > 0 else None
        say(json.dumps(row))
        rows.append(row)
    return rows


# Medians of single calls, in turns, by the thread's own clock: what other processes disturb is left out.
COST = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import numpy as np
import monitor
served = monitor.Monitor(sys.argv[1])
share, served.share = served.share, 0.0
images = np.load(sys.argv[2])[: served.manifest["input"]["shape"][0]]
def plain(images):
    given = served.tvm.runtime.tensor(np.ascontiguousarray(images), device=served.device)
    return served.machine["main"](given).numpy()
def timed(call):
    start = time.thread_time()
    call(images)
    return 1e3 * (time.thread_time() - start)
rows = {"plain": [], "call": [], "sample": [], "after": []}
until = time.thread_time() + float(sys.argv[3])
while time.thread_time() < until:
    pairs = [(timed(plain), timed(served)) for _ in range(8)][2:]
    rows["plain"].append([pair[0] for pair in pairs])
    rows["call"].append([pair[1] for pair in pairs])
    rows["sample"].append([timed(served.observe)])
    rows["after"].append([timed(plain) for _ in range(6)])
middle = {name: np.median(np.array(found), axis=0) for name, found in rows.items()}
plain_ms, sample_ms = float(np.median(rows["plain"])), float(middle["sample"][0])
found = {"plain_ms": plain_ms, "sample_ms": sample_ms, "share": share, "rounds": len(rows["plain"])}
found["wrapper"] = float(np.median(rows["call"])) / plain_ms - 1
found["slower_after_ms"] = float((middle["after"] - plain_ms).sum())
found["one_in"] = sample_ms / share / plain_ms
found["cost"] = found["wrapper"] + share * (1 + found["slower_after_ms"] / sample_ms)
print(json.dumps(found))
"""


def cost(bundle: Path, images: np.ndarray, folder: Path, seconds: float = 60.0) -> dict[str, Any]:
    """What the default monitor adds to the time of calls, as a part of it: around every call, in chosen ones, in those after."""
    given = folder / "cost.npy"
    np.save(given, images)
    command = [sys.executable, "-c", COST, str(bundle), str(given), str(seconds)]
    environment = os.environ | {"TVM_USE_RUNTIME_LIB": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def alarms(bench: Bench, draws: int = 100) -> dict[str, Any]:
    """Draws of images without a shift: in how many anything drifts, by the threshold and by its part that noise determines."""
    import tvm

    from qsearch.adapt.versions import read_bundle
    from qsearch.calibrate.drift import LEAST_INDEX
    from qsearch.export import monitor
    from qsearch.export.reference_counts import drift_reference

    bundle = bench.bundle("none", "alarms")
    manifest, record = read_bundle(bundle)
    counter, reference = monitor.Counter(bundle, record, manifest, tvm), drift_reference(record)
    images = bench.images(np.concatenate([bench.pixels, bench.served]), "none")
    counts = np.stack([counter(image[None]).astype(np.int32) for image in images])
    random, found = np.random.default_rng(0), {}
    for size in (16, 64, 256):
        index = np.stack([reference.index(counts[random.choice(len(counts), size, False)].sum(0)) for _ in range(draws)])
        by_noise = reference.alarm * reference.noise * (1 / size + 1 / reference.images)
        found[str(size)] = {
            "draws": draws,
            "drift": int((index > reference.thresholds(size)).any(1).sum()),
            "above_noise": int((index > by_noise).any(1).sum()),
            "largest_index": float(index.max()),
            "largest_threshold": float(np.maximum(by_noise, LEAST_INDEX).max()),
        }
    return found


def replacing(bundle: Path, repeats: int = 5) -> dict[str, Any]:
    """Seconds to write other scales into a module, and to write a whole new version and put it in the bundle's place."""
    from qsearch.adapt.replay import rescaled_module
    from qsearch.adapt.session import Adaptation, apply_adaptation
    from qsearch.adapt.statistics import CallStatistics
    from qsearch.adapt.validate import Verdict
    from qsearch.adapt.versions import read_bundle, rollback

    module, whole = [], []
    for _ in range(repeats):
        manifest, record = read_bundle(bundle)
        scales = [
            (float(np.float32(1.1 * v["scale"])), v["zero_point"]) if v["replaceable"] else (v["scale"], v["zero_point"])
            for v in record["values"]
        ]
        start = time.perf_counter()
        rescaled_module(bundle, record, scales)
        module.append(time.perf_counter() - start)
        counts = record["arrays"]["counts"].astype(np.int64)
        statistics, outputs = CallStatistics(counts, 1, 1, np.zeros((0, 1))), np.load(bundle / "recorded_outputs.npy")
        made = Adaptation(bundle, manifest, record, statistics, [], scales, Verdict(True, "", 0, ""), outputs)
        whole.append(apply_adaptation(made)["seconds"])
        rollback(bundle)
    return {"module_s": float(np.median(module)), "version_s": float(np.median(whole)), "version_most_s": max(whole)}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--bundle", type=Path, help="measure cost and replacing of a copy of this bundle instead")
    parser.add_argument("--json", action="store_true", help="one document on stdout, which is what it prints anyway")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, parts = Path(name), options.parts.split(",")
        if options.bundle is not None:
            bundle, parts = (
                Path(shutil.copytree(options.bundle, folder / "copy")),
                [p for p in parts if p in ("cost", "replacing")],
            )
            images = runner.recorded_inputs(bundle, runner.read_manifest(bundle))
        else:
            bench = Bench(folder, options.precision)
            bundle, images = bench.bundle("none", "plain"), bench.images(bench.pixels[:16], "none")
        for part in parts:
            say(part)
            if part in ("recovery", "alarms"):
                found[part] = {"recovery": recovery, "alarms": alarms}[part](bench)
            else:
                found[part] = cost(bundle, images, folder) if part == "cost" else replacing(bundle)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
