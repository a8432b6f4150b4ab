"""Memory that running costs, qsearch's modules against OpenVINO (and ONNX Runtime); prints JSON or a table.

    python tests/bench/memory.py --model mobilenet_v2,resnet50 --precision int8,fp32 --json

Each engine loads its compiled model in a fresh process of its own, batch 1, one thread. What is measured there:

written      Bytes of memory pages that one inference writes, however early they were allocated: activations,
             workspace, output, and some 0.2 MB of heap and stack around them. The process makes a twin of itself with
             fork; from then on both share every page, and a page becomes private when the process, which goes on
             with the inference, writes it. This is the figure to compare.
grown        Growth of anonymous memory over the first inferences. Activations that an engine touched when it loaded
             its model are missing from it, and memory that it returns meanwhile is subtracted.
transient    Growth of resident memory within one later inference: what is taken and returned each time (VmHWM).
total        Anonymous memory from before the model is read to after the inferences: packed weights, code, graph and
             activations. Pages mapped from files are left out everywhere: the system may drop and read them again.
live         Sizes of the intermediate tensors alive together at the worst step: a bound for planning without
             computing in place. OpenVINO's come from the graph it says it runs.

`control` writes memory of known size, allocated before, at each call, or at each call and returned; `idle` does
nothing. The caller's input is nobody's. Huge pages are off, so that pages are 4096 bytes. Needs the extra `bench`
and Linux.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CONTROL_BYTES = 4 << 20
CONTROLS = ("held", "kept", "transient", "idle")
TWINS, TWIN_RESTS_S = 5, 0.2
# One heap; large blocks are mapped afresh and returned at once, whatever was freed before.
QUIET_HEAP = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}
PR_SET_THP_DISABLE = 41


def page_bytes(field: str) -> int:
    """One sum over this process's pages, after what the heap has free was returned."""
    ctypes.CDLL(None).malloc_trim(0)
    rows = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines())
    return next(1024 * int(row[1]) for row in rows if row[0] == f"{field}:")


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM."""
    rows = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(1024 * int(row[1]) for row in rows if row[0] == f"{field}:")


def written_bytes(call: Callable[[], object]) -> int:
    """Bytes of the pages that a call writes and that are there when it returns."""
    reading, writing = os.pipe()
    twin = os.fork()
    if twin == 0:
        # Holds the pages until the other end closes.
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    # What the twin itself writes on its way to sleep is private on both sides: let it come to rest first.
    time.sleep(TWIN_RESTS_S)
    page_bytes("Private_Dirty")
    before = page_bytes("Private_Dirty")
    kept = call()
    after = page_bytes("Private_Dirty")
    del kept
    os.close(writing)
    os.waitpid(twin, 0)
    return after - before


def transient_bytes(call: Callable[[], object]) -> int:
    """Most that resident memory grows while a call runs."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = resident_bytes("VmRSS")
    call()
    return resident_bytes("VmHWM") - before


def open_control(kind: str) -> Callable[[], object]:
    """A call that writes CONTROL_BYTES."""
    held = np.ones(CONTROL_BYTES if kind == "held" else 0, np.uint8)
    kept: list[np.ndarray] = []

    def call() -> None:
        if kind == "held":
            held.fill(2)
        elif kind == "kept":
            kept[:] = [np.full(CONTROL_BYTES, 2, np.uint8)]
        elif kind == "transient":
            np.full(CONTROL_BYTES, 2, np.uint8)

    return call


def opener(engine: str, source: str, image: np.ndarray) -> Callable[[], Callable[[], object]]:
    """What loads a model; the engine itself is imported here, before anything is measured."""
    if engine == "control":
        return lambda: open_control(source)
    if engine == "ours":
        # As a bundle runs: TVM's runtime only. Both are read when TVM is imported.
        os.environ |= {"TVM_USE_RUNTIME_LIB": "1", "TVM_NUM_THREADS": "1"}
        import tvm
        from tvm.runtime.vm import VirtualMachine

        given = tvm.runtime.tensor(image)

        def load() -> Callable[[], object]:
            function = VirtualMachine(tvm.runtime.load_module(source), tvm.cpu())["main"]
            return lambda: function(given)

        return load
    from peers import PEERS

    __import__(engine)
    return lambda: PEERS[engine][1](Path(source), image, 1)


def openvino_live_bytes(request: Any) -> int:
    """Of the graph that the CPU plugin runs; it says in which order and precision."""
    from qsearch.build.arena import Lifetime, live_bytes

    model = request.get_compiled_model().get_runtime_model()
    nodes = sorted(model.get_ordered_ops(), key=lambda node: int(node.get_rt_info()["execOrder"].value))
    steps = {node.get_friendly_name(): step for step, node in enumerate(nodes)}
    widths = {"f32": 4, "i32": 4, "u8": 1, "i8": 1, "bf16": 2, "f16": 2, "i64": 8}
    found = []
    for node in nodes:
        if node.get_rt_info()["layerType"].value in ("Const", "Constant", "Input", "Output"):
            continue
        kinds = node.get_rt_info()["outputPrecisions"].value.lower().split(",")
        for output, kind in zip(node.outputs(), kinds, strict=False):
            step = steps[node.get_friendly_name()]
            readers = [steps[target.get_node().get_friendly_name()] for target in output.get_target_inputs()]
            size = int(np.prod(output.get_shape())) * widths[kind]
            found.append(Lifetime(f"{step}:{output.get_index()}", size, step, max([step, *readers])))
    return live_bytes(found)


def measure_here(engine: str, source: str, image_path: str) -> dict[str, int]:
    """Everything about one engine, in this process."""
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    load = opener(engine, source, np.ascontiguousarray(np.load(image_path)))
    gc.collect()
    gc.disable()
    start = page_bytes("Anonymous")
    call = load()
    loaded = page_bytes("Anonymous")
    for _ in range(3):
        call()
    run = page_bytes("Anonymous")
    result = {"grown": run - loaded, "total": run - start, "transient": transient_bytes(call)}
    result["written"] = int(statistics.median(written_bytes(call) for _ in range(TWINS)))
    if engine == "openvino":
        result["live"] = openvino_live_bytes(call())
    return result


def measure(engine: str, source: str, image: Path) -> dict[str, int]:
    """The same in a fresh process."""
    command = [sys.executable, __file__, "--child", engine, source, str(image)]
    done = subprocess.run(command, env=os.environ | QUIET_HEAP, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{engine} {source}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def program_live_bytes(program: Any) -> int:
    """Of our program; its input is the caller's."""
    from qsearch.build.arena import Lifetime, live_bytes

    last = {name: step for step, op in enumerate(program.ops) for name in op.inputs}
    return live_bytes(
        [Lifetime(op.name, op.output.bytes, step, last.get(op.output.name, step)) for step, op in enumerate(program.ops)]
    )


class Exporter:
    """Writes our module and the peers' models of one network."""

    def __init__(self, name: str, options: argparse.Namespace, scratch: Path) -> None:
        from latency import CALIBRATION_IMAGES, Builder, load

        self.name, self.options, self.scratch = name, options, scratch
        self.loaded = load(name)
        shape = (CALIBRATION_IMAGES, *self.loaded.preprocessing.shape)
        self.images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        self.builder = Builder(name, self.loaded, self.images, options.target, options.cache)
        np.save(scratch / "image.npy", self.images[:1])

    def ours(self, precision: str) -> tuple[Path, dict[str, int]]:
        """The module as a shared library, and what we say of its memory."""
        from qsearch.build.cache import KernelCache
        from qsearch.build.link import Linker
        from qsearch.build.target import open_target
        from qsearch.config import QuantConfig
        from qsearch.measure.memory import measure_memory
        from qsearch.quantize.lower import lower
        from qsearch.quantize.weight_store import WeightStore

        config = QuantConfig.model_validate({"default_precision": precision})
        linker = Linker(KernelCache(self.options.cache, open_target(self.options.target, 1)))
        module = linker.build(lower(self.builder.model, config, self.builder.ranges, WeightStore()), linked=False)
        path = self.scratch / f"{precision}.so"
        module.executable.export_library(str(path), addons=[str(file) for file in module.objects])
        memory = measure_memory(module)
        without_input = memory.activation_bytes - module.program.input.bytes
        claims = {"activations": without_input, "workspace": memory.workspace_bytes, "weights": memory.weight_bytes}
        return path, claims | {"live": program_live_bytes(module.program)}

    def peer(self, engine: str, precision: str) -> Path:
        """A peer's model file."""
        from peers import PEERS, export_onnx

        folder = self.options.peers / self.name.replace(":", "-")
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "float.onnx").exists():
            export_onnx(self.loaded.module, self.images[:1], folder / "float.onnx")
        return PEERS[engine][0](folder, precision, self.images)


def rows_of(name: str, options: argparse.Namespace) -> list[dict]:
    """Measure one network at every precision."""
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        exporter, rows = Exporter(name, options, scratch), []
        for precision in options.precision.split(","):
            path, claims = exporter.ours(precision)
            row: dict[str, Any] = {"model": name, "precision": precision, "claimed": claims}
            row["ours"] = measure("ours", str(path), scratch / "image.npy")
            for engine in filter(None, options.against.split(",")):
                row[engine] = measure(engine, str(exporter.peer(engine, precision)), scratch / "image.npy")
                row.setdefault("ratios", {})[engine] = round(row["ours"]["written"] / row[engine]["written"], 3)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def controls() -> dict[str, dict[str, int]]:
    """What the procedure says of known memory."""
    with tempfile.TemporaryDirectory() as scratch:
        image = Path(scratch) / "image.npy"
        np.save(image, np.zeros(1, np.float32))
        return {kind: measure("control", kind, image) for kind in CONTROLS}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenet_v2", help="one or several, comma between")
    parser.add_argument("--precision", default="int8", help="int8, fp32 or both, comma between")
    parser.add_argument("--against", default="openvino", help="openvino, onnxruntime or both, comma between")
    parser.add_argument("--target", default="host")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument("--cache", type=Path, default=Path("studies/cache/kernels"))
    parser.add_argument("--peers", type=Path, default=Path("studies/cache/peers"), help="where the peers' models are kept")
    return parser.parse_args()


def main() -> None:
    """Run the comparison."""
    options = parse()
    report: dict[str, Any] = {"control_bytes": CONTROL_BYTES, "control": controls(), "rows": []}
    for name in options.model.split(","):
        report["rows"] += rows_of(name, options)
    if options.json:
        print(json.dumps(report))
        return
    print(f"{'network':22}{'':6}{'engine':12}{'written':>9}{'grown':>9}{'live':>9}{'total':>9}  MB;  ours over theirs")
    for row in report["rows"]:
        row["ours"]["live"] = row["claimed"]["live"]
        for engine in ("ours", *row.get("ratios", {})):
            figures = "".join(f"{row[engine].get(key, 0) / 1e6:9.2f}" for key in ("written", "grown", "live", "total"))
            print(f"{row['model']:22}{row['precision']:6}{engine:12}{figures}  {row.get('ratios', {}).get(engine, '')}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure_here(*sys.argv[2:5])))
    else:
        main()
