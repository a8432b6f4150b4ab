"""A small network whose latency, memory and loss are formulas: what search tests measure instead of modules."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner, Result

from qsearch.commands import app
from qsearch.config import QuantConfig
from qsearch.errors import MeasureError
from qsearch.measure.image_blocks import Seen
from qsearch.measure.measurement import Accuracy, Latency, Measurement, Memory
from qsearch.models.graph import Conv, Graph, Node
from qsearch.search.bound_space import BoundSpace
from qsearch.search.loop.early_stopping import StoppingRule
from qsearch.search.loop.pipeline import Pipeline
from qsearch.search.loop.workers import Measure, Worker
from qsearch.search.profile import Profile
from qsearch.search.tables.cost import Cost
from qsearch.search.tables.layer_tables import Draft, Tables
from qsearch.search.tables.pairwise import PairwiseSum, nothing
from qsearch.search.tables.settings import Setting, table_settings

LOSS_PER_NAT = 25.0
MODE_FACTOR = {"max": 1.3, "percentile": 1.0, "kl_divergence": 1.1, "mse": 0.9, "global_scale": 2.0}


def make_graph(layers: int = 8) -> Graph:
    """A chain of convolutions, every third depthwise, and a linear layer at the end."""
    nodes = [Node("input", "input", (), (1, 8, 14, 14))]
    for index in range(layers - 1):
        depthwise = index % 3 == 2
        conv = Conv((3, 3), padding=(1, 1, 1, 1), groups=8 if depthwise else 1)
        name = f"features.{index // 3}.conv.{index % 3}"
        nodes.append(Node(name, "conv2d", (nodes[-1].name,), (1, 8, 14, 14), conv=conv))
    nodes.append(Node("flatten", "flatten", (nodes[-1].name,), (1, 8 * 14 * 14)))
    nodes.append(Node("classifier", "linear", ("flatten",), (1, 10), conv=Conv()))
    return Graph(tuple(nodes), "classifier")


def plain_settings(space: BoundSpace) -> tuple[Setting, ...]:
    """Settings that all hold weights alike."""
    none = nothing([len(one.values) for one in space.layers])
    return tuple(Setting(one, none, none) for one in table_settings(space))


class AnalyticEvaluator:
    """An Evaluator over `make_graph` whose measurements depend on the configuration alone.

    With `blocks` it obeys a stopping rule: the interval of its loss shrinks from block to block.
    """

    def __init__(self, layers: int = 8, identity: dict[str, str] | None = None, blocks: bool = False) -> None:
        """Draw the layers' costs."""
        self.blocks = blocks
        self.profile = Profile()
        self.graph = make_graph(layers)
        self.seconds = {"float_pass": 0.25}
        self.identity = identity or {"model": "m" * 64, "data": "d" * 64, "target": "llvm"}
        rng = np.random.default_rng(3)
        self._cost = rng.uniform(0.5, 2.0, layers)
        self._gain = rng.uniform(-0.1, 0.7, layers)
        self._loss = np.exp(rng.normal(-2.0, 1.3, layers))
        self.measured: list[str] = []
        self.process = os.getpid()
        self.baseline = self._measure(QuantConfig(default_precision="fp32"))

    def evaluate(self, config: QuantConfig, rule: StoppingRule | None = None) -> Measurement:
        """Measure, and remember that it was."""
        self.measured.append(config.content_hash())
        measurement = self._measure(config)
        if self.blocks and rule is not None:
            rule.check(measurement.latency, measurement.memory)
            loss, images = measurement.accuracy.top1_loss_pp, measurement.accuracy.images
            for seen in (50, 100, 250, 500):
                half = 0.5 * np.sqrt(images / seen - 1)
                nats = measurement.accuracy.divergence or 0.0
                rule.check(measurement.latency, measurement.memory, Seen(seen, (loss - half, loss + half), nats))
        return measurement

    @contextlib.contextmanager
    def pipeline(self, jobs: int) -> Iterator[Pipeline | None]:
        """None, or with PIPELINE in the environment a worker that measures with a copy of this."""
        if "PIPELINE" not in os.environ:
            yield None
            return
        with Pipeline(lambda config: config, Worker(self.open)) as pipeline:
            yield pipeline

    def open(self) -> Measure:
        """What a worker process measures with."""
        return self.evaluate

    def refer_to(self, baseline: Measurement) -> None:
        """Count against another run's float module, which is the same."""
        self.baseline = baseline

    def keep_to(self, lane: Path, crowded: bool = False) -> None:
        """Formulas disturb nobody."""

    @property
    def device_kind(self) -> str:
        """What the environment says."""
        return os.environ.get("DEVICE", "formulas")

    def kernels_sha256(self, config: QuantConfig) -> str:
        """One kernel for all, which the environment may change."""
        return os.environ.get("KERNELS", "k" * 64)

    def idle_methods(self) -> tuple[str, ...]:
        """None."""
        return ()

    def draft(self, space: BoundSpace, setting: Mapping[str, Any]) -> Draft:
        """The formulas, and tables that know of no other setting."""
        none = nothing([len(one.values) for one in space.layers])
        only = (Setting(setting, none, none),)
        return Draft(self._costs, lambda: replace(self._tables(space), settings=only))

    def tables(self, space: BoundSpace, mixed: bool = True, tried: Sequence[QuantConfig] = ()) -> Tables:
        """The formulas as sums over the layers."""
        return self._tables(space)

    def _costs(self, config: QuantConfig) -> Cost:
        found = self._measure(config)
        return Cost(found.latency.median_ms, found.memory.peak_bytes)

    def _tables(self, space: BoundSpace) -> Tables:

        def total(values: np.ndarray) -> PairwiseSum:
            of_layers = zip(space.layers, values, strict=True)
            return PairwiseSum(tuple(np.array([row[int(name == "int8")] for name in one.values]) for one, row in of_layers), {})

        def divergence(config: QuantConfig) -> PairwiseSum:
            return total(np.outer(self._loss * self._factor(config) / LOSS_PER_NAT, (0.0, 1.0)))

        latency = total(np.stack([self._cost, self._cost * (1 - self._gain)], 1))
        held = total(np.tile((4000.0, 1000.0), (len(space.layers), 1)))
        return Tables(latency, held, divergence, self._costs, self.baseline, plain_settings(space))

    def verify_front(self, configs: Sequence[QuantConfig]) -> list[tuple[Latency, Accuracy]]:
        """Measure again, a little worse; the environment may make it AGAIN=worse for the largest, or AGAIN=noise."""
        again = [self._measure(config, worse=0.25) for config in configs]
        if os.environ.get("AGAIN") == "worse":
            largest = max(range(len(again)), key=lambda index: again[index].memory.peak_bytes)
            slow = max(one.latency.median_ms for one in again) + 1.0
            lossy = replace(again[largest].accuracy, top1_loss_pp=99.0)
            again[largest] = replace(again[largest], latency=Latency(slow, 0.01, 5, 10), accuracy=lossy)
        if os.environ.get("AGAIN") == "noise":
            again[0] = replace(again[0], latency=replace(again[0].latency, noisy=True))
        return [(one.latency, one.accuracy) for one in again]

    def _factor(self, config: QuantConfig) -> float:
        """What calibration and granularity make of every layer's loss."""
        return MODE_FACTOR[config.calibration.mode] * (1.0 if config.granularity == "channel_wise" else 2.5)

    def _measure(self, config: QuantConfig, worse: float = 0.0) -> Measurement:
        resolved = config.resolve(self.graph.layer_types)
        lowered = np.array([resolved[layer.name].precision == "int8" for layer in self.graph.layers])
        latency_ms = float((self._cost * (1 - self._gain * lowered)).sum())
        loss = float((self._loss * lowered).sum() * self._factor(config)) + worse * bool(lowered.any())
        accuracy = Accuracy(90 - loss, 99.0, loss, (loss - 0.5, loss + 0.5), 1000, "0" * 64, loss / LOSS_PER_NAT)
        memory = Memory(int(4000 * len(lowered) - 3000 * lowered.sum()), 1000, 0)
        if "FLOAT_IS_BEST" in os.environ and lowered.any():
            latency_ms, memory = 20.0 + lowered.sum(), Memory(100_000, 0, 0)
        seconds = {"lower": 0.01, "build": 0.02}
        return Measurement(Latency(latency_ms, 0.01, 5, 10), memory, accuracy, seconds, self.kernels_sha256(config))


class TroublesomeEvaluator(AnalyticEvaluator):
    """Does what environment variables say: TROUBLE at the measurement TROUBLE_AT.

    TROUBLE=kill|interrupt|hang|memory|fail|defect|slow|noise, or fatal, which dies of every sixth configuration at any time.
    """

    def evaluate(self, config: QuantConfig, rule: StoppingRule | None = None) -> Measurement:
        """Measure, or make trouble."""
        trouble, at = os.environ.get("TROUBLE", ""), int(os.environ.get("TROUBLE_AT", "1"))
        if trouble == "slow":
            time.sleep(0.5)
        if trouble == "fatal" and int(config.content_hash(), 16) % 6 == 0:
            os.kill(self.process, signal.SIGSEGV)
            time.sleep(5)
        if len(self.measured) + 1 == at:
            self._make_trouble(trouble)
        measurement = super().evaluate(config, rule)
        if trouble == "noise" and len(self.measured) >= at:
            return replace(measurement, latency=replace(measurement.latency, noisy=True))
        return measurement

    def _make_trouble(self, trouble: str) -> None:
        if trouble == "kill":
            os.kill(self.process, signal.SIGKILL)
            time.sleep(5)
        elif trouble == "interrupt":
            os.kill(self.process, signal.SIGINT)
            time.sleep(5)
        elif trouble == "hang":
            time.sleep(1000)
        elif trouble == "memory":
            taken = np.ones(1_500_000_000 // 8)
            time.sleep(1000)
            del taken
        elif trouble == "fail":
            self.measured.append("failed")
            raise MeasureError("layer 'classifier': no time could be taken")
        elif trouble == "defect":
            raise ZeroDivisionError("a defect")


def open_evaluator(settings: object, progress: object, asked: object = None) -> AnalyticEvaluator:
    """Stand in for qsearch.search.evaluation.objective.open_evaluator."""
    print("a library that prints to stdout")
    identity = {"model": os.environ.get("MODEL", "m" * 64), "data": "d" * 64, "target": "llvm"}
    return TroublesomeEvaluator(identity=identity, blocks="BLOCKS" in os.environ)


def stand_in() -> types.ModuleType:
    """A module to put in place of qsearch.search.evaluation.objective."""
    module = types.ModuleType("qsearch.search.evaluation.objective")
    module.open_evaluator = open_evaluator  # type: ignore[attr-defined]
    module.prepare_evaluator = open_evaluator  # type: ignore[attr-defined]
    return module


@contextlib.contextmanager
def standing_in() -> Iterator[None]:
    """This network in place of every model."""
    # One name is put back, not all of sys.modules: what libraries imported meanwhile must not be imported twice.
    name, session = "qsearch.search.evaluation.objective", "qsearch.session.search_session"
    kept = sys.modules.get(name)
    sys.modules.pop(session, None)
    sys.modules[name] = stand_in()
    try:
        yield
    finally:
        del sys.modules[name]
        if kept is not None:
            sys.modules[name] = kept
        sys.modules.pop(session, None)


def invoke(folder: Path, *arguments: str, **variables: str) -> Result:
    """Run a command over this network within this process."""
    with standing_in(), contextlib.chdir(folder):
        return CliRunner().invoke(app.app, arguments, env=variables)


def main() -> None:
    """Run the command line with this network in place of every model."""
    sys.modules["qsearch.search.evaluation.objective"] = stand_in()
    app.main()


if __name__ == "__main__":
    main()
