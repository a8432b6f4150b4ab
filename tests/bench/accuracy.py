"""Images that quantized networks have right, counted on compiled modules, over calibration draws; --json prints all of it.

    python tests/bench/accuracy.py --model efficientnet_lite0 --data DATA --seeds 3 --json
    python tests/bench/accuracy.py --model demo
    python tests/bench/accuracy.py --model fashion_networks:resnet18

The networks of `fashion_networks.py` are trained first where the cache folder has no weights of theirs.
Every setting is lowered, compiled and run on all images of both halves; `correct` is out of all of them. The calibration
images are drawn from the search half, another draw for each seed. `seconds` is the time from the configuration to the
linked module, kernels and what the methods keep compiled included where a setting is the first to need them. --peers adds
ONNX Runtime and NNCF by their own recommended settings, on the same calibration images (extra `bench`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fashion_networks
import numpy as np

from qsearch.config import QuantConfig
from qsearch.data import Part
from qsearch.measure.memory import measure_memory
from qsearch.models.zoo import load_model
from qsearch.search.evaluation.evaluator import Settings
from qsearch.search.evaluation.objective import ModelEvaluator, prepare_evaluator

EIGHT = {"precision": "int8"}
# 4 bits in pointwise and linear layers, and in all layers but the first and the last.
POINTWISE = {"default_precision": "w4a8", "rules": [{"types": ["depthwise"], **EIGHT}, {"position": "first", **EIGHT}]}
INNER = {"default_precision": "w4a8", "rules": [{"position": [0, -1], **EIGHT}]}
NEAREST = {"weight_scale": "mse", "bias_correction": "measured"}
SECOND = {"rounding": "second_order", "bias_correction": "measured"}
GROUPS = {"granularity": "group_wise", "weight_symmetry": "asymmetric"}
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {"default_precision": "fp32"},
    "int8 channel_wise": {},
    "int8 layer_wise": {"granularity": "layer_wise"},
    "int8 layer_wise, equalized, corrected": {
        "granularity": "layer_wise",
        "equalization": True,
        "bias_correction": "measured",
    },
    "int16": {"default_precision": "int16"},
    "w4 pointwise and linear": {**POINTWISE, "weight_scale": "mse"},
    "w4 pointwise and linear, corrected": {**POINTWISE, **NEAREST},
    "w4 pointwise and linear, second order": {**POINTWISE, **SECOND},
    "w4 pointwise and linear, groups, second order": {**POINTWISE, **SECOND, **GROUPS},
    "w4 inner": {**INNER, "weight_scale": "mse"},
    "w4 inner, corrected": {**INNER, **NEAREST},
    "w4 inner, groups": {**INNER, **NEAREST, **GROUPS},
    "w4 inner, second order": {**INNER, **SECOND},
    "w4 inner, learned": {**INNER, "rounding": "learned"},
    "w4 inner, learned by layer": {**INNER, "rounding": "learned_layer"},
    "w4 inner, groups, second order": {**INNER, **SECOND, **GROUPS},
    "rule_driven": {
        "calibration": {"mode": "global_scale", "global_scale": 6.0},
        "skip_dense_layers": True,
    },
}


def peer_rows(options: argparse.Namespace, seed: int, folder: Path) -> list[dict[str, Any]]:
    """ONNX Runtime and NNCF under one calibration draw."""
    from peers import PEERS, export_onnx

    evaluator = open_model(options, seed)
    images = evaluator.images("calibration")
    with contextlib.redirect_stdout(sys.stderr):
        export_onnx(load_model(options.model, options.weights).module.eval(), images[:1], folder / "float.onnx")
    rows = []
    for peer, (make, _) in PEERS.items():
        # The makers print.
        with contextlib.redirect_stdout(sys.stderr):
            run = RUNS[peer](make(folder, "int8", images))
        rows.append(
            counted(evaluator, f"{peer} int8", seed, lambda part: np.stack([run(x[None]) for x in evaluator.images(part)]))
        )  # noqa: B023
    return rows


def onnxruntime_runner(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Logits of one image by ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})[0][0]


def openvino_runner(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Logits of one image by OpenVINO, in float32 where it is not integer."""
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda image: next(iter(compiled([image]).values()))[0].copy()


RUNS = {"onnxruntime": onnxruntime_runner, "openvino": openvino_runner}


def open_model(options: argparse.Namespace, seed: int) -> ModelEvaluator:
    """The model and its images under one calibration draw."""
    settings = Settings(options.model, options.weights, options.data, cache_dir=options.cache, seed=seed)
    return prepare_evaluator(settings, lambda clause: print(clause, file=sys.stderr, flush=True))


def counted(evaluator: ModelEvaluator, name: str, seed: int, logits: Callable[[Part], np.ndarray]) -> dict[str, Any]:
    """How many images of both halves are right."""
    parts: tuple[Part, ...] = ("search_half", "heldout")
    right = {part: int((logits(part).argmax(1) == evaluator.dataset.labels(part)).sum()) for part in parts}
    row = {"setting": name, "seed": seed, "correct": sum(right.values()), **right}
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def fitting(setting: dict[str, Any], evaluator: ModelEvaluator) -> dict[str, Any]:
    """A setting without its rules for types of layers that the model has none of."""
    types = set(evaluator.graph.layer_types.values())
    return setting | {"rules": [rule for rule in setting.get("rules", []) if types & set(rule.get("types", types))]}


def measure(options: argparse.Namespace, seed: int, names: list[str]) -> list[dict[str, Any]]:
    """All settings under one calibration draw."""
    evaluator, rows = open_model(options, seed), []
    for name in names:
        config = QuantConfig.model_validate(fitting(SETTINGS[name], evaluator) if name in SETTINGS else json.loads(name))
        start = time.monotonic()
        module = evaluator.compile(config)
        seconds = time.monotonic() - start
        row = counted(evaluator, name, seed, partial(evaluator.logits, module))
        rows.append(row | {"weight_bytes": measure_memory(module).weight_bytes, "seconds": round(seconds, 2)})
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("studies/cache"))
    parser.add_argument("--seeds", type=int, default=3, help="calibration draws")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), help="names, or configurations as JSON")
    parser.add_argument("--peers", action="store_true", help="ONNX Runtime and NNCF, too")
    parser.add_argument("--json", action="store_true", help="print every count as one JSON document instead of a table")
    options = parser.parse_args()
    home, _, name = options.model.partition(":")
    if home == fashion_networks.__name__ and options.weights is None:
        options.weights = fashion_networks.trained(name, options.cache)
        options.data = options.data or Path("demo")
    rows = [row for seed in range(options.seeds) for row in measure(options, seed, options.settings)]
    for seed in range(options.seeds if options.peers else 0):
        with tempfile.TemporaryDirectory() as folder:
            rows += peer_rows(options, seed, Path(folder))
    summary = []
    for name in dict.fromkeys(row["setting"] for row in rows):
        counts = [row["correct"] for row in rows if row["setting"] == name]
        summary.append({"setting": name, "mean": float(np.mean(counts)), "least": min(counts), "most": max(counts)})
    if options.json:
        print(json.dumps({"model": options.model, "results": summary, "rows": rows}, indent=1))
        return
    for row in summary:
        print(f"{row['mean']:8.1f}  {row['least']} to {row['most']}  {row['setting']}")


if __name__ == "__main__":
    main()
