"""Latency of qsearch's modules against OpenVINO and ONNX Runtime, in turns, in one process; prints JSON.

    python tests/bench/latency.py --model mobilenet_v2 --precision int8 --threads 1 --against openvino,onnxruntime --json
    python tests/bench/latency.py --model resnet50 --precision int8 --layers
    python tests/bench/latency.py --model resnet50 --precision int16 --against own:fp32

All contestants get the same network, image and thread count. A round is one turn of each, in a new random order;
a turn is one untimed call, which wakes its own threads while the others' fall asleep, and a few timed ones. A
ratio pairs the times of one round: the peer's over ours, above one where we are faster. `own:PRECISION` and
`own:PRECISION:THREADS` put another of our own modules among the contestants. Peers need the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from qsearch.build.cache import KernelCache
from qsearch.build.link import CompiledModule, Linker
from qsearch.build.target import open_target
from qsearch.build.threads import ThreadedModule, use_threads
from qsearch.calibrate.observe import observe
from qsearch.calibrate.ranges import activation_ranges
from qsearch.config import QuantConfig
from qsearch.measure.memory import measure_memory
from qsearch.models.import_torch import import_model
from qsearch.models.zoo import LoadedModel, load_model
from qsearch.quantize.lower import lower
from qsearch.quantize.weight_store import WeightStore

CALIBRATION_IMAGES = 16


def load(name: str) -> LoadedModel:
    """A model of the zoo; a bare name that is none of qsearch's own is torchvision's."""
    return load_model(name if ":" in name or name in ("demo", "efficientnet_lite0") else f"torchvision:{name}")


class Builder:
    """Builds qsearch's modules of one model; the model is imported and observed once."""

    def __init__(self, name: str, loaded: LoadedModel, images: np.ndarray, target: str, cache: Path) -> None:
        self.images, self.target, self.cache = images, target, cache
        self.model = import_model(name, loaded.module, (1, *loaded.preprocessing.shape))
        reach = float(np.abs(images).max())
        calibration = QuantConfig().calibration
        self.ranges = activation_ranges(observe(self.model, images, 8), self.model, calibration, (-reach, reach))

    def build(self, precision: str, threads: int) -> CompiledModule:
        """The compiled module at one precision."""
        config = QuantConfig.model_validate({"default_precision": precision})
        linker = Linker(KernelCache(self.cache, open_target(self.target, threads)))
        return linker.build(lower(self.model, config, self.ranges, WeightStore()))

    def call(self, module: CompiledModule, threads: int) -> Callable[[], object]:
        """One inference of a module."""
        import tvm

        given = tvm.runtime.tensor(self.images[:1])
        function = ThreadedModule(module.open()["main"], threads)
        return lambda: function(given)


def interleave(calls: dict[str, Callable[[], object]], rounds: int, repeat: int) -> dict[str, np.ndarray]:
    """Milliseconds per call: contestant -> one mean of `repeat` calls per round."""
    order = np.random.default_rng(0)
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for call in calls.values():
        for _ in range(5):
            call()
    for _ in range(rounds):
        for name in order.permutation(names):
            calls[name]()
            start = time.perf_counter()
            for _ in range(repeat):
                calls[name]()
            times[name].append(1e3 * (time.perf_counter() - start) / repeat)
    return {name: np.array(values) for name, values in times.items()}


def spread(values: np.ndarray) -> dict[str, float]:
    """Median and the outer tenths."""
    low, middle, high = (round(float(q), 3) for q in np.percentile(values, [10, 50, 90]))
    return {"median": middle, "p10": low, "p90": high}


def contestants(options: argparse.Namespace, builder: Builder, module: torch.nn.Module) -> dict[str, Callable[[], object]]:
    """Our module and every peer asked for, ready to call."""
    from peers import PEERS, export_onnx

    calls = {"ours": builder.call(builder.build(options.precision, options.threads), options.threads)}
    folder = options.peers / f"{options.model.replace(':', '-')}"
    image = builder.images[:1]
    for name in filter(None, options.against.split(",")):
        if name.startswith("own:"):
            _, precision, threads = [*name.split(":"), str(options.threads)][:3]
            calls[name] = builder.call(builder.build(precision, int(threads)), int(threads))
            continue
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "float.onnx").exists():
            export_onnx(module, image, folder / "float.onnx")
        make, opened = PEERS[name]
        precision = options.precision if options.precision in ("fp32", "int8") else "int8"
        calls[name] = opened(make(folder, precision, builder.images), image, options.threads)
    return calls


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--precision", default="int8", help="int8, fp32, int16 or w4a8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--against", default="openvino,onnxruntime")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--repeat", type=int, default=5, help="timed calls of a turn")
    parser.add_argument("--target", default="host")
    parser.add_argument("--layers", action="store_true", help="a table of every kernel's GOP/s beside OpenVINO's")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument("--cache", type=Path, default=Path("studies/cache/kernels"))
    parser.add_argument("--peers", type=Path, default=Path("studies/cache/peers"), help="where the peers' models are kept")
    return parser.parse_args()


def main() -> None:
    """Run the comparison."""
    options = parse()
    use_threads(max([options.threads, *(int(n.split(":")[2]) for n in options.against.split(",") if n.count(":") == 2)]))
    torch.set_num_threads(1)
    loaded = load(options.model)
    images = np.random.default_rng(0).standard_normal((CALIBRATION_IMAGES, *loaded.preprocessing.shape)).astype(np.float32)
    builder = Builder(options.model, loaded, images, options.target, options.cache)
    calls = contestants(options, builder, loaded.module)
    if options.layers:
        from layers import layer_table

        layer_table(options, builder)
        return
    times = interleave(calls, options.rounds, options.repeat)
    memory = measure_memory(builder.build(options.precision, options.threads))
    report = {
        "model": options.model,
        "precision": options.precision,
        "threads": options.threads,
        "rounds": options.rounds,
        "ratios": {name: spread(values / times["ours"]) for name, values in times.items() if name != "ours"},
        "latency_ms": {name: round(float(np.median(values)), 4) for name, values in times.items()},
        "memory_bytes": {
            "weights": memory.weight_bytes,
            "activations": memory.activation_bytes,
            "workspace": memory.workspace_bytes,
        },
    }
    if options.json:
        print(json.dumps(report))
        return
    for name, ratio in report["ratios"].items():
        print(f"{name:20} {ratio['median']:.2f} ({ratio['p10']:.2f} to {ratio['p90']:.2f})  {report['latency_ms'][name]:.3f} ms")
    print(f"{'ours':20} {report['latency_ms']['ours']:.3f} ms")


if __name__ == "__main__":
    main()
