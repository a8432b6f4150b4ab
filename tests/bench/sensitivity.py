"""The sensitivity table against true one-layer measurements of compiled modules; prints JSON.

    python tests/bench/sensitivity.py --model efficientnet_lite0 --data DATA --truth FOLDER
    python tests/bench/sensitivity.py --model demo --precisions int8

The table is computed from the first search images. The truth is one compiled module per layer, precision and granularity,
run on all search images; its outputs are kept in FOLDER and not computed again, as long as model, images, target, kernels
and configuration are the same.

kl                 Spearman of the table with the mean KL divergence from float's outputs, over layers and precisions:
                   `same` on the table's images, `all` on all search images; `log_spread` is the standard deviation of the
                   logarithm of their ratio.
loss               Spearman with the loss in top-1. Most losses of one layer are smaller than the interval that the images
                   leave them, so that no prediction can order them: `kl` is what the exact divergence reaches, and
                   `ceiling` what the expected losses themselves would reach, if they were a monotone function of the
                   divergence, against a measurement with the noise that a bootstrap over images shows (mean, 5 and 95 %).
                   `significant` are the losses whose 95 % paired interval excludes zero.
cost               Seconds of the table (one granularity), of the truth it stands for, and their ratio; `cpu` is processor time.
mixtures           Random mixtures of precisions: Kendall's tau with the measured divergence, and R2 of its logarithm (a line
                   fitted to the logarithm of the prediction). `additive` adds the table's entries, `neighbours` adds the
                   coupling of adjacent layers, `measured` adds the true one-layer divergences.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from problems import fingerprint
from scipy.optimize import isotonic_regression
from scipy.special import log_softmax
from scipy.stats import kendalltau, spearmanr

from qsearch.config import QuantConfig
from qsearch.measure.accuracy import paired_interval
from qsearch.search.evaluation.evaluator import Settings
from qsearch.search.evaluation.objective import FLOAT, ModelEvaluator, prepare_evaluator
from qsearch.search.tables.sensitivity import IMAGES, SensitivityRequest, measure_sensitivity
from qsearch.search.tables.sensitivity_table import Sensitivity

BOOTSTRAPS = 300
MIXTURE_IMAGES = 128


@dataclass(frozen=True)
class Truth:
    """What compiled modules did: one row per module, one column per image."""

    divergence: np.ndarray
    lost: np.ndarray
    seconds: float
    cpu: float


class Modules:
    """Outputs of compiled modules on the search images, kept in a folder."""

    def __init__(self, evaluator: ModelEvaluator, folder: Path) -> None:
        self.evaluator, self.folder = evaluator, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.labels = evaluator.dataset.labels("search")
        self.float_log = log_softmax(self._run("float", FLOAT)["logits"].astype(np.float64), 1)

    def truth(self, configs: dict[str, QuantConfig], images: int | None = None) -> Truth:
        rows = [self._run(name, config, images) for name, config in configs.items()]
        logs = [log_softmax(row["logits"].astype(np.float64), 1) for row in rows]
        right = self.float_log.argmax(1) == self.labels
        return Truth(
            np.array([(np.exp(self.float_log[: len(log)]) * (self.float_log[: len(log)] - log)).sum(1) for log in logs]),
            np.array([right[: len(log)] * 1 - (log.argmax(1) == self.labels[: len(log)]) for log in logs]),
            float(sum(row["seconds"] for row in rows)),
            float(sum(row["cpu"] for row in rows)),
        )

    def _run(self, name: str, config: QuantConfig, images: int | None = None) -> dict[str, Any]:
        given = self.evaluator.images("search")[:images]
        parts = {"kernels": self.evaluator.kernels_sha256(config), "config": config.content_hash(), "images": str(len(given))}
        path = self.folder / f"{name}-{fingerprint(self.evaluator.identity | parts)[:16]}.npz"
        if not path.is_file():
            wall, cpu = time.monotonic(), time.process_time()
            module = self.evaluator.compile(config)
            machine, rows = module.open()["main"], []
            import tvm

            for image in given:
                rows.append(machine(tvm.runtime.tensor(np.ascontiguousarray(image[None]))).numpy())
            logits = np.concatenate(rows)
            np.savez(path, logits=logits, seconds=time.monotonic() - wall, cpu=time.process_time() - cpu)
        with np.load(path) as archive:
            return dict(archive)


def table_of(
    evaluator: ModelEvaluator, arguments: argparse.Namespace, granularities: list[str]
) -> tuple[Sensitivity, float, float]:
    """The table and what it cost: seconds, processor seconds."""
    wall, cpu = time.monotonic(), time.process_time()
    request = SensitivityRequest(
        evaluator.model,
        evaluator.images("search")[: arguments.images],
        evaluator.ranges,
        evaluator.variants.plain.weights,
        lambda config: {},
        {layer.name: ("fp32", *arguments.precisions) for layer in evaluator.graph.layers},
        [QuantConfig.model_validate({"granularity": granularity}) for granularity in granularities],
        arguments.seed,
    )
    table = measure_sensitivity(request, lambda done, total: None)
    return table, time.monotonic() - wall, time.process_time() - cpu


def against_divergence(predicted: np.ndarray, truth: Truth, images: int) -> dict[str, float]:
    same, whole = truth.divergence[:, :images].mean(1), truth.divergence.mean(1)
    return {
        "count": len(predicted),
        "same": float(spearmanr(predicted, same)[0]),
        "all": float(spearmanr(predicted, whole)[0]),
        "log_spread": float(np.std(np.log(predicted / same))),
        "log_spread_all": float(np.std(np.log(predicted / whole))),
    }


def against_loss(predicted: np.ndarray, truth: Truth) -> dict[str, Any]:
    """Spearman with the losses, over all of them and over those that are not noise."""
    count = truth.lost.shape[1]
    intervals = [paired_interval(int((row > 0).sum()), int((row < 0).sum()), count) for row in truth.lost]
    significant = np.array([low > 0 for low, _ in intervals])
    chosen = {"all": np.ones(len(predicted), bool), "significant": significant}
    return {name: _ranks(predicted[rows], truth, rows) for name, rows in chosen.items() if rows.sum() > 4}


def _ranks(predicted: np.ndarray, truth: Truth, rows: np.ndarray) -> dict[str, Any]:
    lost, divergence = truth.lost[rows], truth.divergence[rows].mean(1)
    loss, count = lost.mean(1), lost.shape[1]
    order = np.argsort(divergence)
    expected = np.empty(len(loss))
    # What ties an isotonic fit makes, the divergence breaks.
    expected[order] = isotonic_regression(loss[order]).x
    expected += 1e-9 * divergence
    rng, reached = np.random.default_rng(0), []
    for _ in range(BOOTSTRAPS):
        noise = lost[:, rng.integers(0, count, count)].mean(1) - loss
        reached.append(spearmanr(expected, expected + noise)[0])
    return {
        "count": len(loss),
        "loss_pp": [float(100 * value) for value in np.percentile(loss, [0, 25, 50, 75, 100])],
        "table": float(spearmanr(predicted, loss)[0]),
        "kl": float(spearmanr(divergence, loss)[0]),
        "ceiling": [float(value) for value in (np.mean(reached), *np.percentile(reached, [5, 95]))],
    }


def against_mixtures(table: Sensitivity, modules: Modules, arguments: argparse.Namespace, single: np.ndarray) -> dict[str, Any]:
    """Random mixtures: every share of every precision occurs."""
    rng, names = np.random.default_rng(arguments.seed + 1), list(table.layers)
    choices = ["fp32", *arguments.precisions]
    mixtures: list[dict[str, str]] = []
    for _ in range(arguments.mixtures):
        shares = rng.dirichlet(np.ones(len(choices)))
        mixtures.append({name: str(rng.choice(choices, p=shares)) for name in names})
    truth = modules.truth(
        {f"mixture-{i}": QuantConfig(default_precision="fp32", precision=m) for i, m in enumerate(mixtures)}, MIXTURE_IMAGES
    )
    measured = truth.divergence.mean(1)
    config = QuantConfig.model_validate({"granularity": arguments.granularities[0]})
    one = table.divergence(config)
    pairs = {pair: table.coupling(pair, config) for pair in zip(names, names[1:], strict=False)}
    found: dict[str, list[float]] = {"additive": [], "neighbours": [], "measured": []}
    for mixture in mixtures:
        place = {name: choices.index(precision) for name, precision in mixture.items()}
        found["additive"].append(sum(one[name][place[name]] for name in names))
        extra = sum(pairs[a, b][place[a], place[b]] for a, b in pairs)
        found["neighbours"].append(max(found["additive"][-1] + extra, 0.1 * found["additive"][-1]))
        found["measured"].append(sum(single[table.places[name, p]] for name, p in mixture.items() if p != "fp32"))
    return {name: _fit(np.array(values), measured) for name, values in found.items()} | {"count": len(mixtures)}


def _fit(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    # A mixture of nothing but fp32 has no logarithm.
    some = (predicted > 0) & (measured > 0)
    x, y = np.log(predicted[some]), np.log(measured[some])
    return {"kendall_tau": float(kendalltau(predicted, measured)[0]), "r2_log": float(np.corrcoef(x, y)[0, 1] ** 2)}


def compare(evaluator: ModelEvaluator, arguments: argparse.Namespace) -> dict[str, Any]:
    modules = Modules(evaluator, arguments.truth)
    _, wall, cpu = table_of(evaluator, arguments, arguments.granularities[:1])
    table, _, _ = table_of(evaluator, arguments, arguments.granularities)
    pairs = list(table.places)
    results: dict[str, Any] = {"model": evaluator.model.name, "images": arguments.images, "kl": {}, "loss": {}}
    predictions, truths = [], []
    for granularity in arguments.granularities:
        configs = {
            f"{granularity}-{p}-{layer}": QuantConfig.model_validate(
                {"default_precision": "fp32", "precision": {layer: p}, "granularity": granularity}
            )
            for layer, p in pairs
        }
        truth = modules.truth(configs)
        entries = table.divergence(QuantConfig.model_validate({"granularity": granularity}))
        predicted = np.array([entries[layer][table.layers[layer].index(p)] for layer, p in pairs])
        for name in (*arguments.precisions, "pooled"):
            rows = np.array([name in ("pooled", p) for _, p in pairs])
            part = Truth(truth.divergence[rows], truth.lost[rows], 0, 0)
            results["kl"][f"{granularity} {name}"] = against_divergence(predicted[rows], part, arguments.images)
        results["loss"][granularity] = against_loss(predicted, truth)
        predictions.append(predicted)
        truths.append(truth)
    both = Truth(np.concatenate([t.divergence for t in truths]), np.concatenate([t.lost for t in truths]), 0, 0)
    results["loss"]["pooled"] = against_loss(np.concatenate(predictions), both)
    first = truths[0]
    results["cost"] = {
        "table": {"seconds": wall, "cpu": cpu},
        "truth": {"seconds": first.seconds, "cpu": first.cpu, "modules": len(pairs)},
        "ratio": first.seconds / wall,
        "ratio_cpu": first.cpu / cpu,
    }
    if arguments.mixtures:
        results["mixtures"] = against_mixtures(table, modules, arguments, first.divergence.mean(1))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--cache", type=Path, default=Path("studies/cache"))
    parser.add_argument("--truth", type=Path, default=Path("studies/cache/one-layer"))
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--mixtures", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=["int8", "w4a8"])
    parser.add_argument("--granularities", type=lambda text: text.split(","), default=["channel_wise", "layer_wise"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(model=arguments.model, data=arguments.data, cache_dir=arguments.cache)
    print(json.dumps(compare(prepare_evaluator(settings, lambda text: None), arguments), indent=1))


if __name__ == "__main__":
    main()
