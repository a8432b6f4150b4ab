"""The cost table's latencies against measured ones, over configurations that no table was fitted to.

Mixtures are drawn with a random share of every precision, so that they spread over the whole range. Each is predicted by the
sum of its kernels' times (`exact`), by the pairwise split of that sum (`pairwise`), and by the layers' costs in uniform networks
(`uniform`, what a search plans with before trials tell it more), and measured as a trial is: in turns with the float module.
Three figures of each:

- raw_pct: mean absolute error of the table as it is, percent of the measured latency;
- scaled_pct: the same with one common factor, fitted to other mixtures that stand for the planner's first trials;
- kendall_tau: of the order.

All are measured a second time, later and in another order: what the two measurements differ by is noise that no table can
predict, and their tau is the most that a perfect one could be expected to reach.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau

from qsearch.config import QuantConfig
from qsearch.measure.latency import measure_paired
from qsearch.search.bound_space import BoundSpace, bind_space
from qsearch.search.evaluation.evaluator import Settings
from qsearch.search.evaluation.objective import ModelEvaluator, open_evaluator
from qsearch.search.space import SearchSpace
from qsearch.search.tables.measure_tables import measure_tables

# Mixtures beside those that count, as many as the planner has seen when its scale is known well.
FIRST_TRIALS = 10


def space_of(evaluator: ModelEvaluator, precisions: list[str]) -> BoundSpace:
    """Every layer free, ranges by their extremes: the calibration does not change a kernel."""
    chosen = {"version": 1, "name": "costs", "precisions": {"default": precisions}, "calibration": {"modes": ["max"]}}
    return bind_space(SearchSpace.model_validate(chosen | {"granularities": ["channel_wise"]}), evaluator.graph)


def draw(space: BoundSpace, count: int, seed: int) -> np.ndarray:
    """Mixtures, int (N, layers)."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        share = rng.dirichlet(np.ones(max(len(one.values) for one in space.layers)))
        rows.append(
            [rng.choice(len(one.values), p=share[: len(one.values)] / share[: len(one.values)].sum()) for one in space.layers]
        )
    return np.array(rows)


def config_of(space: BoundSpace, row: np.ndarray) -> QuantConfig:
    return space.config({one.name: one.values[value] for one, value in zip(space.layers, row, strict=True)})


def measure(evaluator: ModelEvaluator, configs: list[QuantConfig], seed: int) -> np.ndarray:
    """Milliseconds of every configuration, each in turns with float, in a random order."""
    image, reference_ms = evaluator.images("search")[:1], evaluator.baseline.latency.median_ms
    reference = evaluator.compile(QuantConfig(default_precision="fp32")).open()
    found = np.zeros(len(configs))
    for k in np.random.default_rng(seed).permutation(len(configs)):
        machine = evaluator.compile(configs[k]).open()
        (latency,) = measure_paired(reference, [machine], image, reference_ms, threads=evaluator.target.threads)
        found[k] = latency.median_ms
    return found


def compare(predicted: np.ndarray, measured: np.ndarray, first: int) -> dict[str, float]:
    """Error and order over all but the first mixtures, whose scale is taken."""
    scale = float(np.median(measured[:first] / predicted[:first]))
    predicted, measured = predicted[first:], measured[first:]
    return {
        "raw_pct": 100 * float(np.abs(predicted / measured - 1).mean()),
        "scale": scale,
        "scaled_pct": 100 * float(np.abs(scale * predicted / measured - 1).mean()),
        "kendall_tau": float(kendalltau(predicted, measured)[0]),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = Settings(arguments.model, data=arguments.data, cache_dir=arguments.cache, threads=arguments.threads)
    evaluator = open_evaluator(settings, lambda clause: None)
    space = space_of(evaluator, arguments.precisions)
    # First, while no times among others are known.
    uniform = measure_tables(evaluator, space, lambda clause: None, mixed=False)
    tables = measure_tables(evaluator, space, lambda clause: None)
    rows = draw(space, FIRST_TRIALS + arguments.mixtures, arguments.seed)
    configs = [config_of(space, row) for row in rows]
    exact = np.array([tables.cost(config).latency_ms for config in configs])
    predicted = {"exact": exact, "pairwise": tables.latency(rows), "uniform": uniform.latency(rows)}
    once, again = measure(evaluator, configs, arguments.seed + 1), measure(evaluator, configs, arguments.seed + 2)
    results = {name: compare(values, once, FIRST_TRIALS) for name, values in predicted.items()}
    results["mean_of_two"] = compare(exact, (once + again) / 2, FIRST_TRIALS)
    results["measured_again"] = compare(again, once, FIRST_TRIALS)
    return {
        "model": arguments.model,
        "precisions": arguments.precisions,
        "mixtures": arguments.mixtures,
        "float_ms": evaluator.baseline.latency.median_ms,
        "range_ms": [float(once.min()), float(once.max())],
        "table_seconds": {name: evaluator.seconds[name] for name in ("cost_table", "uniform_costs")},
        "results": results,
        "predicted_ms": exact.tolist(),
        "measured_ms": [once.tolist(), again.tolist()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--cache", type=Path, default=Path("studies/cache"))
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=["fp32", "int8"])
    parser.add_argument("--mixtures", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    document = run(arguments)
    if arguments.json:
        print(json.dumps(document, indent=1))
        return
    print(
        f"{arguments.model}: {arguments.mixtures} mixtures from {document['range_ms'][0]:.3f} to {document['range_ms'][1]:.3f} ms"
    )
    for name, found in document["results"].items():
        print(
            f"{name:15} raw {found['raw_pct']:5.2f} %  scaled by {found['scale']:.3f} {found['scaled_pct']:5.2f} %  "
            f"tau {found['kendall_tau']:.3f}"
        )


if __name__ == "__main__":
    main()
