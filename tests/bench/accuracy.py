"""Images that quantized networks have right, counted on compiled modules, over calibration draws; prints JSON.

    python tests/bench/accuracy.py --model efficientnet_lite0 --data DATA --seeds 3

Every setting is lowered, compiled and run on all images of both halves; `correct` is out of all of them. The calibration
images are drawn from the search half, another draw for each seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from qsearch.config import QuantConfig
from qsearch.measure.memory import measure_memory
from qsearch.search.evaluation.evaluator import Settings
from qsearch.search.evaluation.objective import prepare_evaluator

W4 = {"default_precision": "w4a8", "rounding": "nearest", "weight_scale": "mse"}
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
    "rule_driven": {
        "calibration": {"mode": "global_scale", "global_scale": 6.0},
        "skip_dense_layers": True,
    },
}


def measure(options: argparse.Namespace, seed: int, names: list[str]) -> list[dict[str, Any]]:
    """All settings under one calibration draw."""
    settings = Settings(options.model, data=options.data, cache_dir=options.cache, seed=seed)
    evaluator = prepare_evaluator(settings, lambda clause: print(clause, file=sys.stderr, flush=True))
    rows = []
    for name in names:
        config = QuantConfig.model_validate(SETTINGS[name] if name in SETTINGS else json.loads(name))
        start = time.monotonic()
        module = evaluator.compile(config)
        seconds = time.monotonic() - start
        right = {}
        for part in ("search_half", "heldout"):
            logits = evaluator.logits(module, part)
            right[part] = int((logits.argmax(1) == evaluator.dataset.labels(part)).sum())
        rows.append(
            {
                "setting": name,
                "seed": seed,
                "correct": sum(right.values()),
                **right,
                "weight_bytes": measure_memory(module).weight_bytes,
                "seconds": round(seconds, 2),
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("studies/cache"))
    parser.add_argument("--seeds", type=int, default=3, help="calibration draws")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), help="names, or configurations as JSON")
    options = parser.parse_args()
    rows = [row for seed in range(options.seeds) for row in measure(options, seed, options.settings)]
    summary = []
    for name in options.settings:
        counts = [row["correct"] for row in rows if row["setting"] == name]
        summary.append({"setting": name, "mean": float(np.mean(counts)), "least": min(counts), "most": max(counts)})
    print(json.dumps({"model": options.model, "results": summary, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
