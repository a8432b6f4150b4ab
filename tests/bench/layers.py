"""Every kernel of a module inside the running network, beside OpenVINO's same layer.

Times are medians over runs of the whole network, ours taken by the virtual machine's instrument, OpenVINO's by
its own counters, in alternating runs: a kernel meets the caches as its predecessors left them.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
from peers import layer_path, make_openvino, open_openvino
from tvm import tirx
from tvm.tirx.script import builder as T

from qsearch.build.link import CompiledModule
from qsearch.build.target import Target, open_target
from qsearch.kernels.cpu.vectors import constant, kernel, load, splat, store
from qsearch.quantize.program import Op

__all__ = ["layer_table"]

RUNS = 30
PEAK_STEPS = 4096
PEAK_ACCUMULATORS = 12


def layer_table(options: argparse.Namespace, builder: Any) -> None:
    """Print a row per kernel: microseconds, share, GOP/s, share of peak, and OpenVINO's microseconds and ratio."""
    module = builder.build(options.precision, options.threads)
    folder = options.peers / options.model.replace(":", "-")
    precision = options.precision if options.precision in ("fp32", "int8") else "int8"
    ours = _Instrumented(module, builder.images[:1])
    path = make_openvino(folder, precision, builder.images)
    peer = open_openvino(path, builder.images[:1], options.threads, profile=True)
    own: list[list[float]] = []
    theirs: list[dict[str, float]] = []
    for _ in range(RUNS):
        own.append(ours())
        theirs.append({node.node_name: node.real_time.total_seconds() for node in peer()})  # type: ignore[attr-defined]
    medians = np.median(own[3:], 0) * 1e6
    peer_us = {name: float(np.median([run.get(name, 0.0) for run in theirs[3:]])) * 1e6 for name in theirs[-1]}
    peak = {kind: peak_gops(open_target(options.target), kind) * options.threads for kind in ("uint8", "float32")}
    rows = [_row(op, float(us), medians.sum(), peer_us, peak) for op, us in zip(module.program.ops, medians, strict=True)]
    if options.json:
        print(json.dumps({"model": options.model, "peak_gops": peak, "layers": rows, "openvino_us": sum(peer_us.values())}))
        return
    print(f"nominal peak, measured: {peak}; ours {medians.sum():.0f} us, OpenVINO {sum(peer_us.values()):.0f} us")
    for row in sorted(rows, key=lambda row: -row["us"]):
        peers = f"{row['openvino_us']:7.1f} {row['ratio']:5.2f}" if row["openvino_us"] else " " * 13
        rate = f"{row['gops']:6.0f} {100 * row['of_peak']:3.0f} %" if row["gops"] else " " * 12
        print(f"{row['us']:8.1f} {100 * row['share']:5.1f} % {rate} {peers}  {row['name']:32} {row['what']}")


def _row(op: Op, us: float, total: float, peer_us: dict[str, float], peak: dict[str, float]) -> dict[str, Any]:
    key = op.key
    operations, theirs = 0, 0.0
    if key.kind == "conv2d":
        operations = 2 * int(np.prod(key.shapes[-1])) * int(np.prod(op.constants["weight"].shape[1:]))
        marks = [layer_path(op.name) + kind for kind in ("Conv", "Gemm", "MatMul")]
        theirs = max((us for name, us in peer_us.items() if any(mark in name for mark in marks)), default=0.0)
    rate = operations / us / 1e3
    what = f"{key.kind} {key.precision or ''} {key.shapes[0]}->{key.shapes[-1]}"
    if key.kind == "conv2d":
        what += f" k{key.conv.kernel} s{key.conv.stride[0]} g{key.conv.groups}{' +' if key.residual else ''}"
    return {
        "name": op.name,
        "what": what,
        "us": us,
        "share": us / total,
        "gops": rate,
        "of_peak": rate / peak.get(key.dtypes[0], peak["uint8"]),
        "openvino_us": theirs,
        "ratio": theirs / us,
    }


class _Instrumented:
    """A module that times each of its kernels as it runs."""

    def __init__(self, module: CompiledModule, image: np.ndarray) -> None:
        import tvm

        self.machine = module.open()
        self.given = tvm.runtime.tensor(image)
        self.times: list[float] = []
        self.start = 0.0
        self.machine.set_instrument(self._mark)

    def _mark(self, function: Any, name: str, before: bool, result: Any, *arguments: Any) -> int:
        if not name.startswith("qs_"):
            return 0
        if before:
            self.start = time.perf_counter()
        else:
            self.times.append(time.perf_counter() - self.start)
        return 0

    def __call__(self) -> list[float]:
        self.times = []
        self.machine["main"](self.given)
        return self.times


def peak_gops(target: Target, dtype: str) -> float:
    """What one core can issue: dot or multiply-add steps on registers alone, nothing loaded, in GOP/s."""
    import tvm

    isa = target.isa
    kind = "int32" if dtype == "uint8" else "float32"

    def body() -> None:
        output = T.arg("output", T.Buffer((PEAK_ACCUMULATORS * isa.lanes,), kind))
        accumulators = T.alloc_buffer((PEAK_ACCUMULATORS,), f"{kind}x{isa.lanes}", scope="local", layout=None)
        start = [load(output, i * isa.lanes, isa.lanes) for i in range(PEAK_ACCUMULATORS)]
        for i, value in enumerate(start):
            T.buffer_store(accumulators, value, [i])
        factor = T.alloc_buffer((1,), kind, scope="local", layout=None)
        T.buffer_store(factor, load(output, 0), [0])
        with T.serial(0, PEAK_STEPS):
            for i in range(PEAK_ACCUMULATORS):
                T.buffer_store(accumulators, _issue(isa, dtype, tirx.BufferLoad(accumulators, [i]), factor), [i])
        for i in range(PEAK_ACCUMULATORS):
            store(output, i * isa.lanes, tirx.BufferLoad(accumulators, [i]), isa.lanes)

    built = tvm.compile(tvm.IRModule({"peak": kernel("peak", body)}), target=target.tvm())
    output = tvm.runtime.tensor(np.zeros(PEAK_ACCUMULATORS * isa.lanes, kind))
    seconds = min(built.mod.time_evaluator("peak", tvm.cpu(), number=20, repeat=9)(output).results)
    group = isa.dot_group if dtype == "uint8" else 1
    return 2 * group * isa.lanes * PEAK_ACCUMULATORS * PEAK_STEPS / seconds / 1e9


def _issue(isa: Any, dtype: str, current: Any, factor: Any) -> Any:
    scalar = tirx.BufferLoad(factor, [0])
    if dtype == "uint8":
        weights = constant(3, "int8", isa.lanes * isa.dot_group)
        return isa.dot(current, scalar if isa.dot_group == 4 else tirx.Cast("uint8", scalar), weights)
    return isa.multiply_add(f"float32x{isa.lanes}", current, splat(scalar, isa.lanes), constant(1.5, "float32", isa.lanes))
