"""What only a GPU can tell: kernels against the NumPy reference, whole networks, latencies; writes one JSON document.

    python tests/device/check.py --out device.json --seconds 540

Steps come in the order of what they are worth and are begun only while there is time; the document is written anew after
each, so that one that was cut short holds what was finished.

kernels    Every operation of small and real networks at every precision and in mixtures, alone, on the reference's values
           and on random ones, outputs poisoned before. Integers must be equal; floats within TOLERANCE of the largest.
networks   Whole modules with captured graphs: int8 against the same program compiled for the CPU, fp16 against fp32.
latency    Milliseconds of whole networks by precision and batch, graphs on and off; of torch, eager and compiled, where
           torch has CUDA.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import networks
import torch
import tvm

from qsearch.build.cache import KernelCache
from qsearch.build.cuda_toolkit import find_compiler, gpu_architecture
from qsearch.build.link import Linker
from qsearch.build.machine import on_device
from qsearch.build.target import open_target
from qsearch.calibrate.observe import observe
from qsearch.calibrate.ranges import activation_ranges
from qsearch.config import QuantConfig
from qsearch.measure.latency import measure_latency
from qsearch.models.graph import Model
from qsearch.models.import_torch import import_model
from qsearch.models.zoo import load_model
from qsearch.quantize.lower import lower
from qsearch.quantize.program import Op, Program
from qsearch.quantize.reference import run_op
from qsearch.quantize.weight_store import WeightStore

TOLERANCE = {"float32": 1e-4, "float16": 2e-3}
TF32_TOLERANCE = 2e-3
SMALL = ("residual", "bottlenecks", "excite", "shuffle", "vit", "swin", "convnext")
REAL = ("mobilenet_v2", "efficientnet_lite0", "resnet50")
PRECISIONS = ("int8", "fp16", "tf32", "fp32", "int16", "w4a8")
BATCHES = (1, 8, 128)


class Network:
    """A model at one batch, observed on random images."""

    def __init__(self, name: str, batch: int, size: int = 224) -> None:
        own = name if name == "efficientnet_lite0" else f"torchvision:{name}"
        self.name, self.batch, self.module = name, batch, load_model(own).module.eval()
        self.images = np.random.default_rng(0).standard_normal((max(batch, 4), 3, size, size)).astype(np.float32)
        observed: Model = import_model(name, self.module, (1, 3, size, size))
        reach = float(np.abs(self.images).max())
        record = observe(observed, self.images[:4], 4)
        self.model = observed if batch == 1 else import_model(name, self.module, (batch, 3, size, size))
        self.ranges = activation_ranges(record, self.model, QuantConfig().calibration, (-reach, reach))

    def lower(self, config: QuantConfig) -> Program:
        """The program of a configuration."""
        return lower(self.model, config, self.ranges, WeightStore())


def at(precision: str) -> QuantConfig:
    """Every layer at one precision."""
    return QuantConfig.model_validate({"default_precision": precision})


def mixture(model: Model, seed: int) -> QuantConfig:
    """A random precision for every layer."""
    rng = np.random.default_rng(seed)
    return QuantConfig(
        default_precision="fp32", precision={node.name: str(rng.choice(PRECISIONS)) for node in model.graph.layers}
    )


class Checker:
    """Runs single kernels on the GPU."""

    def __init__(self, linker: Linker) -> None:
        self.linker, self.seen, self.rows = linker, set[str](), list[dict[str, Any]]()

    def program(self, name: str, program: Program, image: np.ndarray, random: bool) -> None:
        """Every kernel of a program that was not met before, on the reference's values, and on random ones."""
        values = {program.input.name: image}
        rng = np.random.default_rng(0)
        for op in program.ops:
            given = [values[value] for value in op.inputs]
            values[op.output.name] = run_op(op, given)
            if op.key.kind == "foreign":
                continue
            ((_, call),) = self.linker.calls([op])
            if call.symbol in self.seen:
                continue
            self.seen.add(call.symbol)
            self.check(name, op, call, given, values[op.output.name])
            if random:
                drawn = [self.draw(rng, value) for value in given]
                self.check(f"{name}, random", op, call, drawn, run_op(op, drawn))

    @staticmethod
    def draw(rng: np.random.Generator, like: np.ndarray) -> np.ndarray:
        """Values of the same dtype, the ends of its range among them."""
        if like.dtype.kind == "f":
            return (like.std() + 1) * rng.standard_normal(like.shape).astype(like.dtype)
        low, high = int(like.min()), int(like.max())
        return rng.choice(np.array([low, high, *range(low, high + 1)]), like.shape).astype(like.dtype)

    def check(self, name: str, op: Op, call: Any, given: list[np.ndarray], expected: np.ndarray) -> None:
        """Run one kernel and note how it did."""
        compiled = self.linker.cache.get([(call.symbol, call.kernel)])[call.symbol]
        names = iter(given)
        arrays = [next(names).ravel() if isinstance(a, str) else a.array for a in call.arguments]
        poison = np.full(expected.nbytes, 0xA5, np.uint8).view(expected.dtype)
        output = on_device(poison, "cuda")
        compiled.library[call.symbol](*(on_device(array, "cuda") for array in arrays), output)
        found = output.numpy().reshape(expected.shape)
        row = {"network": name, "op": op.name, "kind": op.key.kind, "precision": op.key.precision, "dtypes": op.key.dtypes}
        row |= {"shapes": op.key.shapes}
        if expected.dtype.kind == "f":
            scale = float(np.abs(expected.astype(np.float64)).max()) or 1.0
            error = float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max()) / scale
            tolerance = TF32_TOLERANCE if op.key.precision == "tf32" else TOLERANCE[expected.dtype.name]
            row |= {"error": error, "right": bool(error <= tolerance)}
        else:
            wrong = int((found != expected).sum())
            row |= {"wrong": wrong, "right": wrong == 0}
        self.rows.append(row)


def kernels(linker: Linker) -> Iterator[dict[str, Any]]:
    """Programs to check kernel by kernel."""
    checker = Checker(linker)
    for name in SMALL:
        model, _ = networks.network(name)
        image = networks.images(1)
        for config in (*map(at, PRECISIONS), *(mixture(model, seed) for seed in range(3))):
            ranges = networks.ranges_of(model, config)
            checker.program(name, lower(model, config, ranges, WeightStore()), image, random=True)
        yield summary(checker)
    for name in REAL:
        network = Network(name, 1, 96)
        for config in (*map(at, PRECISIONS), mixture(network.model, 0)):
            checker.program(name, network.lower(config), network.images[:1], random=False)
            yield summary(checker)


def summary(checker: Checker) -> dict[str, Any]:
    """What is known so far."""
    wrong = [row for row in checker.rows if not row["right"]]
    return {"kernels": len(checker.seen), "checks": len(checker.rows), "wrong": len(wrong), "examples": wrong[:20]}


def whole_networks(linker: Linker, cpu: Linker) -> Iterator[dict[str, Any]]:
    """Modules against the CPU's, and against fp32."""
    found = {}
    for name in REAL:
        network = Network(name, 1)
        image = network.images[:1]
        outputs = {}
        for precision in ("fp32", "fp16", "int8", "w4a8"):
            machine = linker.build(network.lower(at(precision))).open()
            runs = [machine["main"](machine.tensor(image)).numpy() for _ in range(3)]
            outputs[precision] = runs[-1]
            found[f"{name} {precision} replays"] = bool(all(np.array_equal(run, runs[0]) for run in runs))
        for precision in ("fp32", "int8", "w4a8"):
            machine = cpu.build(network.lower(at(precision))).open()
            expected = machine["main"](machine.tensor(image)).numpy()
            found[f"{name} {precision} against the CPU"] = relative(outputs[precision], expected)
        found[f"{name} fp16 against fp32"] = relative(outputs["fp16"], outputs["fp32"])
        yield found


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def latencies(linker: Linker, plain: Linker) -> Iterator[list[dict[str, Any]]]:
    """Milliseconds of every network, precision and batch."""
    rows = []
    for batch in BATCHES:
        for name in REAL:
            network = Network(name, batch)
            image = network.images[:batch]
            for precision in ("fp16", "int8", "tf32", "fp32"):
                program = network.lower(at(precision))
                for graphs, builder in (("on", linker), ("off", plain)):
                    latency = measure_latency(builder.build(program).open(), image)
                    row = {"network": name, "batch": batch, "precision": precision, "graphs": graphs}
                    rows.append(row | {"ms": latency.median_ms, "spread_ms": latency.spread_ms})
                yield rows
            if torch.cuda.is_available():
                rows += torch_latencies(network, image)
                yield rows


def torch_latencies(network: Network, image: np.ndarray) -> list[dict[str, Any]]:
    """torch in fp16: eager, and compiled with CUDA graphs."""
    module = network.module.half().cuda().to(memory_format=torch.channels_last)
    given = torch.from_numpy(image).half().cuda().to(memory_format=torch.channels_last)
    rows = []
    for mode, run in (("eager", module), ("compile", torch.compile(module, mode="reduce-overhead"))):
        try:
            ms = torch_ms(run, given)
        except Exception as error:  # no compiler of torch's there: said in its place
            rows.append({"network": network.name, "batch": network.batch, "torch": mode, "error": str(error)[-300:]})
            continue
        rows.append({"network": network.name, "batch": network.batch, "torch": mode, "ms": ms})
    network.module.float().cpu()
    return rows


def torch_ms(run: Callable[[torch.Tensor], torch.Tensor], given: torch.Tensor) -> float:
    """Median milliseconds of a call, by the GPU's clock."""
    with torch.no_grad():
        for _ in range(5):
            run(given)
        times = []
        for _ in range(21):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(10):
                run(given)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 10)
    return float(np.median(times))


def machine() -> dict[str, Any]:
    """What the figures are of."""
    query = "name,driver_version,clocks.sm,clocks.max.sm,memory.total"
    told = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    compiler = find_compiler()
    return {
        "gpu": told.stdout.strip(),
        "arch": gpu_architecture(),
        "compiler": f"{compiler.kind} {compiler.version[0]}.{compiler.version[1]}",
        "tvm": tvm.__version__,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Run the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=540)
    options = parser.parse_args()
    start, document = time.monotonic(), {"machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        target = open_target("cuda")
        linker, plain = (Linker(KernelCache(Path(folder) / "gpu", target), captures=captures) for captures in (True, False))
        cpu = Linker(KernelCache(Path(folder) / "cpu", open_target("host")))
        steps: dict[str, Iterator[Any]] = {
            "kernels": kernels(linker),
            "networks": whole_networks(linker, cpu),
            "latency": latencies(linker, plain),
        }
        for name, step in steps.items():
            try:
                for found in step:
                    document[name] = found
                    document["seconds"] = round(time.monotonic() - start, 1)
                    options.out.write_text(json.dumps(document, indent=1), encoding="utf-8")
                    if time.monotonic() - start > options.seconds:
                        break
            except Exception:  # one step's failure must not cost the others
                document[f"{name} failed"] = traceback.format_exc()[-3000:]
                options.out.write_text(json.dumps(document, indent=1), encoding="utf-8")
    print(json.dumps({key: document[key] for key in document if key != "latency"})[:4000])


if __name__ == "__main__":
    main()
