"""Latency of qsearch's modules against ONNX Runtime, interleaved in one process, one thread; prints JSON.

    python tests/bench/latency.py --model torchvision:mobilenet_v2 --precision int8

Both sides get the same network, the same image and the same thread count, and take turns, one repeat each per
round. ONNX Runtime's int8 is its own recommended static quantization: QDQ, per channel, min-max calibration.
Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TVM_NUM_THREADS", "1")

import numpy as np
import torch

from qsearch.build.cache import KernelCache
from qsearch.build.link import Linker
from qsearch.build.target import open_target
from qsearch.calibrate.observe import observe
from qsearch.calibrate.ranges import activation_ranges
from qsearch.config import QuantConfig
from qsearch.models.import_torch import import_model
from qsearch.models.zoo import load_model
from qsearch.quantize.lower import lower
from qsearch.quantize.weights import WeightStore

CALIBRATION_IMAGES = 16


def qsearch_module(model: str, precision: str, cache: Path, images: np.ndarray) -> Callable[[], object]:
    """A call of qsearch's compiled module."""
    import tvm

    loaded = load_model(model)
    imported = import_model(model, loaded.module, (1, *loaded.preprocessing.shape))
    config = QuantConfig.model_validate({"default_precision": precision})
    reach = float(np.abs(images).max())
    ranges = activation_ranges(observe(imported, images, 8), imported, config.calibration, (-reach, reach))
    target = open_target("host")
    linker = Linker(KernelCache(cache, target))
    machine = linker.build(lower(imported, config, ranges, WeightStore())).open()
    function, given = machine["main"], tvm.runtime.tensor(images[:1])
    return lambda: function(given)


def onnxruntime_module(model: str, precision: str, images: np.ndarray) -> Callable[[], object]:
    """A call of an ONNX Runtime session on one thread."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter([{"x": image[None]} for image in images])

        def get_next(self) -> dict | None:
            return next(self.rows, None)

    folder = Path(tempfile.mkdtemp())
    path = folder / "float.onnx"
    module = load_model(model).module
    torch.onnx.export(module, (torch.from_numpy(images[:1]),), str(path), dynamo=False, opset_version=17, input_names=["x"])
    if precision == "int8":
        quant_pre_process(str(path), str(folder / "prepared.onnx"), skip_symbolic_shape=True)
        path = folder / "int8.onnx"
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(
            str(folder / "prepared.onnx"), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **kinds
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: images[:1]}
    return lambda: session.run(None, given)


def interleave(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds per call, all contestants once per round."""
    for call in calls.values():
        for _ in range(5):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="torchvision:mobilenet_v2")
    parser.add_argument("--precision", default="int8", choices=["int8", "fp32"])
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--cache", type=Path, default=Path("studies/cache/kernels"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = load_model(options.model).preprocessing.shape
    images = np.random.default_rng(0).standard_normal((CALIBRATION_IMAGES, *shape)).astype(np.float32)
    calls = {
        "qsearch": qsearch_module(options.model, options.precision, options.cache, images),
        "onnxruntime": onnxruntime_module(options.model, options.precision, images),
    }
    times = interleave(calls, options.rounds)
    ratios = np.array(times["onnxruntime"]) / np.array(times["qsearch"])
    print(
        json.dumps(
            {
                "model": options.model,
                "precision": options.precision,
                "threads": 1,
                "rounds": options.rounds,
                "median_ms": {name: float(np.median(values)) for name, values in times.items()},
                "speedup_over_onnxruntime": {
                    "median": float(np.median(ratios)),
                    "quartiles": [float(q) for q in np.percentile(ratios, [25, 75])],
                },
            }
        )
    )


if __name__ == "__main__":
    main()
