"""The problems that samplers are compared on: a model, its images, a space, and a folder of what was measured of them."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import small_network
from measured import Answers, MeasuredFolder, cpu_seconds

import qsearch.search
from qsearch.config import QuantConfig, named_config
from qsearch.measure.accuracy import divergences
from qsearch.measure.image_blocks import Seen
from qsearch.measure.measurement import Latency, Measurement, Memory
from qsearch.search.anchors import Anchor
from qsearch.search.bound_space import BoundSpace, bind_space
from qsearch.search.evaluation.evaluator import Settings
from qsearch.search.evaluation.module_builder import Prepared
from qsearch.search.evaluation.objective import ModelEvaluator, open_evaluator
from qsearch.search.front import measurement_from_json
from qsearch.search.loop.early_stopping import Bound, EarlyStop, StoppingRule
from qsearch.search.opening import choose_opening, opening_setting, uniform_anchors
from qsearch.search.space import SearchSpace, load_space
from qsearch.search.study import OBJECTIVE_VERSION
from qsearch.search.tables.layer_tables import Tables

__all__ = [
    "PROBLEMS",
    "FloatRun",
    "Problem",
    "TimedTables",
    "add_options",
    "fingerprint",
    "open_problem",
    "source_digest",
    "write_json",
]

PROBLEMS = ("small", "demo", "efficientnet_lite0")


@dataclass(frozen=True)
class TimedTables:
    """The planner's tables.

    Attributes:
        first: What a planned study begins with.
        opening: What it goes on with.
        parts: What makes the tables that are planned over one after the other, given what was tried, and processor seconds that
            each take after what is before, without the times of what was tried.
        opening_s: Processor seconds that it takes to choose that where nothing is known yet.
    """

    first: list[Anchor]
    opening: list[Anchor]
    parts: list[tuple[Callable[[list[QuantConfig]], Tables], float]]
    opening_s: float


@dataclass(frozen=True)
class FloatRun:
    """What early stopping knows of the float module: its logits, float32 (N, classes), and the labels, int64 (N,)."""

    logits: np.ndarray
    labels: np.ndarray


@dataclass
class Problem:
    """What is searched.

    Attributes:
        name: Of the problem.
        space: Bound to its model.
        baseline: The float module, the same for every process that measures the problem.
        measured: What is known.
        folder: Where runs are kept.
        measure_tables: Measures the planner's tables.
        float_run: Of the search images.
    """

    name: str
    space: BoundSpace
    baseline: Measurement
    measured: MeasuredFolder
    folder: Path
    measure_tables: Callable[[], TimedTables]
    float_run: FloatRun
    _tables: list[TimedTables] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Number of search images."""
        return len(self.float_run.labels)

    def tables(self) -> TimedTables:
        """The planner's tables, made once."""
        if not self._tables:
            self._tables.append(self.measure_tables())
        return self._tables[0]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What says which problem, and where its measurements are."""
    parser.add_argument("--problem", choices=PROBLEMS, required=True)
    parser.add_argument("--data", type=Path, help="labelled images; needed by efficientnet_lite0")
    parser.add_argument("--space", help="a YAML file or the name of a preset instead of the problem's own space")
    parser.add_argument("--measured", type=Path, default=Path("studies/bench"), help="folder of measurements and runs")
    parser.add_argument("--cache", type=Path, help="folder of kernels and images, by default one in that of --measured")


def open_problem(options: argparse.Namespace) -> Problem:
    """Load a problem and what is known of it; options as `add_options` has them."""
    name, root = options.problem, options.measured
    settings, space = _settings(name, root, options.data, options.cache or root / "cache")
    if options.space is not None:
        name, space = f"{name}-{Path(options.space).stem}", load_space(options.space)
    evaluator = open_evaluator(settings, _say)
    folder = root / f"{name}-{fingerprint(_identity(evaluator, space))[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    baseline = _baseline(folder / "baseline.json", evaluator.baseline)
    evaluator.refer_to(baseline)
    bound = bind_space(space, evaluator.graph, evaluator.idle_methods)
    float_run = FloatRun(evaluator.float_logits("search"), evaluator.dataset.labels("search"))
    measured = MeasuredFolder(folder / "measured", _Recorder(evaluator), baseline.latency.median_ms)
    # Their cost is that of this version of them.
    cost = folder / f"tables_cost-{source_digest('tables/*.py')}.json"
    return Problem(name, bound, baseline, measured, folder, lambda: _timed_tables(evaluator, bound, cost), float_run)


class _Recorder:
    """Measures configurations, and remembers what each answered."""

    def __init__(self, evaluator: ModelEvaluator) -> None:
        self.evaluator, self.logits = evaluator, evaluator.measurer.logits
        self.answers: Answers | None = None
        # The dataclass is frozen; its instances are not.
        vars(evaluator.measurer)["logits"] = self._logits

    def _logits(self, prepared: Prepared, check: Callable[..., None] | None) -> np.ndarray:
        logits = self.logits(prepared, check)
        right = logits.argmax(1) == self.evaluator.dataset.labels("search")
        self.answers = Answers(right, divergences(self.evaluator.float_logits("search"), logits).astype(np.float32))
        return logits

    def measure(self, config: QuantConfig) -> tuple[Measurement, Answers | None]:
        return self.evaluator.evaluate(config), self.answers

    def time(self, config: QuantConfig) -> Latency:
        try:
            return self.evaluator.evaluate(config, _TimingOnly({})).latency
        except EarlyStop as stop:
            return stop.bound.latency


class _TimingOnly(StoppingRule):
    """Ends every measurement before the first image."""

    def check(self, latency: Latency, memory: Memory, seen: Seen | None = None) -> None:
        raise EarlyStop(Bound("only timed", latency, memory, seen, False))


def _settings(name: str, root: Path, data: Path | None, cache: Path) -> tuple[Settings, SearchSpace]:
    if name != "small":
        return Settings(name, data=data, cache_dir=cache), load_space("default")
    source = hashlib.sha256(Path(small_network.__file__).read_bytes()).hexdigest()[:12]
    weights = root / f"small_network-{source}.safetensors"
    if not weights.is_file():
        # Kept, not trained anew: another version of PyTorch would give other weights and so another problem.
        _say("training the small network")
        root.mkdir(parents=True, exist_ok=True)
        small_network.train(weights)
    # The built-in images belong to the demo model and fit this one as well.
    return Settings("small_network:build", weights, Path("demo"), cache_dir=cache), small_network.SPACE


def _identity(evaluator: ModelEvaluator, space: SearchSpace) -> dict[str, str]:
    """All that a measurement depends on, as a study has it."""
    kernels = [evaluator.kernels_sha256(named_config(precision)) for precision in space.precisions.names]
    return {**evaluator.identity, "space": space.content_hash(), "objective": OBJECTIVE_VERSION, "kernels": " ".join(kernels)}


def fingerprint(parts: Mapping[str, str]) -> str:
    """Hexadecimal SHA-256 of named texts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _baseline(path: Path, own: Measurement) -> Measurement:
    """The float module as the least disturbed of all processes so far measured it."""
    kept = measurement_from_json(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else own
    found = min(kept, own, key=lambda one: one.latency.median_ms)
    write_json(path, found.to_json())
    return found


def _timed_tables(evaluator: ModelEvaluator, space: BoundSpace, path: Path) -> TimedTables:
    """The tables; their cost was measured, or is now, with a cache that holds nothing but images and the float pass."""
    if not path.is_file():
        settings = evaluator.settings
        with tempfile.TemporaryDirectory(prefix="cold-", dir=settings.cache_dir.parent) as folder:
            cold = Path(folder)
            for part in ("images", "statistics"):
                shutil.copytree(settings.cache_dir / part, cold / part, copy_function=os.link)
            opening_s, *parts_s = _tables_seconds(replace(settings, cache_dir=cold), space)
            # What took minutes is not done again for the tables that are used.
            for part in ("kernels", "sensitivity"):
                _give(cold / part, settings.cache_dir / part)
        write_json(path, {"opening_s": opening_s, "parts_s": parts_s})
    seconds, draft = json.loads(path.read_text(encoding="utf-8")), evaluator.draft(space, opening_setting(space))
    opening = choose_opening(space, draft.cost, evaluator.baseline)
    drafted = draft.tables()
    # They are there from now on, but for times of what was tried, which every run takes by itself.
    evaluator.tables(space, mixed=False)
    parts = [lambda tried: drafted, lambda tried: evaluator.tables(space, mixed=False, tried=tried)]
    return TimedTables(uniform_anchors(space), opening, list(zip(parts, seconds.pop("parts_s"), strict=True)), **seconds)


def _give(source: Path, target: Path) -> None:
    """Link the files of a folder into another one that lacks them."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and not (target / file.name).exists():
            os.link(file, target / file.name)


def _tables_seconds(settings: Settings, space: BoundSpace) -> list[float]:
    """Processor seconds of the opening, and of each part of the tables after it."""
    evaluator = open_evaluator(settings, _say)
    times = [cpu_seconds()]
    draft = evaluator.draft(space, opening_setting(space))
    choose_opening(space, draft.cost, evaluator.baseline)
    times.append(cpu_seconds())
    for make in (draft.tables, lambda: evaluator.tables(space, mixed=False)):
        make()
        times.append(cpu_seconds())
    return np.diff(times).tolist()


def source_digest(*patterns: str) -> str:
    """Digest of some source files of the search, named by globs."""
    folder = Path(qsearch.search.__file__).parent
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def write_json(path: Path, data: object) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(data), encoding="utf-8")
    partial.replace(path)


def _say(clause: str) -> None:
    print(clause, file=sys.stderr, flush=True)
