"""A model, its images and a target: from a configuration to the measurements of its compiled module."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from qsearch.build.link import CompiledModule
from qsearch.build.target import Target
from qsearch.config import QuantConfig
from qsearch.data import Dataset
from qsearch.errors import TrialError, UnsupportedModelError
from qsearch.measure.accuracy import run_images
from qsearch.measure.devices.device import Device, Prepared
from qsearch.measure.devices.local import LocalDevice
from qsearch.measure.latency import TimingSettings, middle_of
from qsearch.measure.measurement import Accuracy, Latency, Measurement, Memory
from qsearch.measure.tune import TunedKernel, tune_programs
from qsearch.models.detection import DetectionHead
from qsearch.models.graph import Model
from qsearch.quantize.program import Program
from qsearch.search.bound_space import BoundSpace
from qsearch.search.evaluation.evaluator import Progress, Settings
from qsearch.search.evaluation.model_images import ModelImages
from qsearch.search.evaluation.module_builder import ModuleBuilder
from qsearch.search.evaluation.module_measurer import AGAIN, ModuleMeasurer
from qsearch.search.evaluation.open_away import open_away
from qsearch.search.evaluation.remeasure import remeasure
from qsearch.search.evaluation.requirements import open_local_target, require_room
from qsearch.search.locks import lane_held
from qsearch.search.loop.early_stopping import StoppingRule
from qsearch.search.loop.pipeline import Pipeline
from qsearch.search.loop.processors import Processors, default_jobs, split_processors
from qsearch.search.loop.workers import Worker
from qsearch.search.provenance import device_kind
from qsearch.search.tables.layer_tables import Draft, Tables
from qsearch.search.tables.measure_tables import measure_draft, measure_tables

__all__ = ["FLOAT", "ModelEvaluator"]

FLOAT = QuantConfig(default_precision="fp32")
# How long the module is timed that all others are counted against.
_LONGER = TimingSettings(repeats=4 * TimingSettings.repeats)


class ModelEvaluator(ModelImages):
    """A model, its images and a target, ready to measure configurations.

    Args:
        settings: As for ModelImages, and so are the others.
        target: What to compile for.
    """

    def __init__(
        self,
        settings: Settings,
        model: Model,
        dataset: Dataset,
        target: Target,
        progress: Progress,
        head: DetectionHead | None = None,
    ) -> None:
        super().__init__(settings, model, dataset, progress, head)
        self.target = target
        self.away = open_away(settings, target)
        # What modules are compiled for to be run here, in order to see what they compute.
        self.run_target = target if self.away is None else open_local_target("host", 1)
        value_range = dataset.preprocessing.value_range
        self._builder = ModuleBuilder(self.variants, value_range, self.run_target, settings.cache_dir, self.away)
        self.linker = self._builder.linker if self.away is None else self.away.linker
        self.device: Device = LocalDevice(target.threads) if self.away is None else self.away.device
        self._float_logits: dict[str, np.ndarray] = {}
        self._baseline: Measurement | None = None
        self._measurer: ModuleMeasurer | None = None
        self._lane: Path | None = None
        self._processors: Processors | None = None

    @property
    def identity(self) -> dict[str, str]:
        """Fingerprints of model, data and target; of a detector also how its output is read."""
        found = {
            "model": self.model.fingerprint,
            "data": self.dataset.fingerprint,
            "target": self.target.description,
        }
        if self.batch != 1:
            found["batch"] = str(self.batch)
        if self.away is not None:
            found["device"] = self.away.description
        return found if self.head is None else found | {"detection": json.dumps(self.head.to_json(), sort_keys=True)}

    @property
    def baseline(self) -> Measurement:
        """The module with every layer in fp32, on the search images."""
        if self._baseline is None:
            self.measure_baseline()
        assert self._baseline is not None
        return self._baseline

    def measure_baseline(self) -> None:
        """Measure the float module, that everything is counted against.

        Raises:
            UnsupportedModelError: It cannot be built or measured.
        """
        self._require_float()
        with self._of_float():
            prepared = self._builder.prepare(FLOAT)
            latency = self.device.alone(self.device.handle(prepared), self.timed_images("search"), _LONGER)
            logits = self.float_logits("search")
        accuracy = self.scorer("search").compare(logits, logits)
        self.refer_to(Measurement(latency, prepared.memory, accuracy, prepared.seconds, prepared.kernels_sha256))

    def refer_to(self, baseline: Measurement) -> None:
        """Count latencies against a float module that was measured before, as a continued study has to."""
        self._baseline, self._measurer = baseline, None

    def keep_to(self, lane: Path, crowded: bool = False) -> None:
        """Measure only while nobody else does who keeps to the same lane.

        An RPC tracker gives each of its devices to one at a time, and what is done here does not disturb them: no lane is kept.

        Args:
            lane: See `lane_file`.
            crowded: Whether others work on this machine: what is done here besides measuring then keeps off the processors
                that they measure on.
        """
        if self.settings.rpc is not None:
            return
        threads = self.run_target.threads
        self._processors = split_processors(default_jobs(threads), threads) if crowded else None
        self._lane, self._measurer = lane, None

    @property
    def device_kind(self) -> str:
        """What modules are timed on: latencies of different kinds do not belong in one study."""
        if self.away is not None:
            return self.away.description
        return device_kind(self.target.device)

    def compile(self, config: QuantConfig) -> CompiledModule:
        """Lower and link one configuration.

        Raises:
            TrialError: It cannot be quantized or built.
        """
        return self.build(self._builder.lower(config))

    def kernels_sha256(self, config: QuantConfig) -> str:
        """Digest of the kernels that a configuration's module would be linked from now, without compiling them.

        Raises:
            TrialError: It cannot be quantized or built.
        """
        return self.linker.kernels_sha256(self._builder.lower(config))

    def tune(self, configs: Sequence[QuantConfig], seconds: float, progress: Callable[[int, int], None]) -> list[TunedKernel]:
        """Time register tiles of the kernels of some configurations, see `tune_programs`."""
        require_room(self.settings.cache_dir)
        programs = [self._builder.lower(config) for config in configs]
        return tune_programs(self.linker, programs, seconds, progress)

    def build(self, program: Program) -> CompiledModule:
        """Link a program, see `ModuleBuilder.build`."""
        return self._builder.build(program)

    def pack(self, config: QuantConfig, folder: Path) -> Prepared:
        """Lower and link one configuration for another process, see `ModuleBuilder.pack`."""
        return self._builder.pack(config, folder)

    def prepare_program(self, program: Program) -> Prepared:
        """Link a program to be measured, see `ModuleBuilder.prepare_program`."""
        return self._builder.prepare_program(program)

    def _require_float(self) -> None:
        """Refuse a device elsewhere that knows nothing of float."""
        if self.away is not None:
            self.away.require(self._builder.lower(FLOAT))

    @contextmanager
    def _of_float(self) -> Iterator[None]:
        """Say of a failure inside the block that it is not a matter of quantization."""
        try:
            yield
        except TrialError as error:
            raise UnsupportedModelError(
                f"model {self.model.name!r} fails in float already: {error}. Replace that part of the model, or keep it out of "
                "what is exported"
            ) from error

    def lower(self, config: QuantConfig) -> Program:
        """The program of a configuration.

        Raises:
            TrialError: It cannot be quantized.
        """
        return self._builder.lower(config)

    def ranges(self, config: QuantConfig) -> dict[str, tuple[float, float]]:
        """Activation ranges of a configuration's calibration."""
        return self._builder.ranges(config)

    def evaluate(self, config: QuantConfig, rule: StoppingRule | None = None) -> Measurement:
        """Lower, compile, link and measure one configuration on the search images.

        Raises:
            TrialError: This configuration cannot be built or measured; others may.
            EarlyStop: The rule has seen enough.
        """
        return self.measurer.measure(self._builder.prepare(config), rule)

    @property
    def measurer(self) -> ModuleMeasurer:
        """What measures modules against the baseline."""
        if self._measurer is None:
            images, scorer = partial(self.images, "search"), self.scorer("search")
            logits, reference_ms = self.float_logits("search"), self.baseline.latency.median_ms
            threads, device = self.run_target.threads, self.device
            self._measurer = ModuleMeasurer(
                lambda: self._reference,
                reference_ms,
                images,
                scorer,
                logits,
                threads,
                device=device,
                runs_on=self.run_target.device,
                batch=self.batch,
                lane=self._lane,
                processors=self._processors or Processors(),
            )
        return self._measurer

    @contextmanager
    def pipeline(self, jobs: int) -> Iterator[Pipeline | None]:
        """Measure configurations in a process of its own; None where that is not wanted.

        Args:
            jobs: 1 for one thing at a time.

        Raises:
            UsageError: There are not enough processors for so many jobs.
        """
        # Sessions with a device elsewhere are this process's.
        processors = None if self.settings.rpc is not None else split_processors(jobs, self.run_target.threads)
        if processors is None:
            with nullcontext() if self._processors is None else self._processors.aside():
                yield None
            return
        modules, images = self.settings.cache_dir / "modules", self.settings.cache_dir / "images"
        modules.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=modules) as name:
            with self._of_float():
                reference = self._builder.pack(FLOAT, Path(name), kept=True)
            open_images = partial(self.dataset.images, "search", images)
            opened = partial(self.device.handle, reference)
            measurer = replace(self.measurer, open_reference=opened, open_images=open_images, processors=processors)
            with Pipeline(partial(self._builder.pack, folder=Path(name)), Worker(measurer.open), processors) as pipeline:
                yield pipeline

    @cached_property
    def _reference(self) -> Any:
        """The device's handle of the float module."""
        with self._of_float():
            return self.device.handle(self._builder.prepare(FLOAT))

    def idle_methods(self) -> Collection[str]:
        """Methods that find nothing to do in the model."""
        return self.variants.idle

    def draft(self, space: BoundSpace, setting: Mapping[str, Any]) -> Draft:
        """What trials can be planned with while there are no tables, see `measure_draft`."""
        with lane_held(self._lane):
            draft = measure_draft(self, space, setting, self.progress)

        def tables() -> Tables:
            with lane_held(self._lane):
                return draft.tables()

        return Draft(draft.cost, tables)

    def tables(self, space: BoundSpace, mixed: bool = True, tried: Sequence[QuantConfig] = ()) -> Tables:
        """The planner's tables, see `measure_tables`."""
        with lane_held(self._lane):
            return measure_tables(self, space, self.progress, mixed, tried)

    def compare(self, configs: Mapping[str, QuantConfig], part: str) -> dict[str, tuple[Latency, Memory, Accuracy, float]]:
        """Measure configurations side by side, each timed as a trial is: in turns with float.

        Args:
            configs: Name -> configuration.
            part: Which images.

        Returns:
            Name -> latency, memory, accuracy, and float's latency over this one's.
        """
        self._require_float()
        with self._of_float():
            reference = self._reference
            self.float_logits(part)
        modules = {name: self._builder.prepare(config) for name, config in configs.items()}
        image = self.timed_images(part)
        float_ms = self.device.alone(reference, image, _LONGER).median_ms
        latencies = self.device.paired(reference, [self.device.handle(one) for one in modules.values()], image, float_ms)
        return {
            name: (latency, module.memory, self.accuracy(module, part), float_ms / latency.median_ms)
            for (name, module), latency in zip(modules.items(), latencies, strict=True)
        }

    def accuracy(self, module: CompiledModule | Prepared, part: str) -> Accuracy:
        """Accuracy of a module on a part of the images."""
        return self.scorer(part).compare(self.logits(module, part), self.float_logits(part))

    def logits(self, module: CompiledModule | Prepared, part: str) -> np.ndarray:
        """What a module computes of a part of the images, float32 (N, classes)."""
        return self.outputs(module, self.images(part))

    def outputs(self, module: CompiledModule | Prepared, images: np.ndarray) -> np.ndarray:
        """What a module computes of images, float32 (N, C, H, W)."""
        target = self.run_target
        return run_images(module.open, images, self.batch, target.threads, target.device)

    def verify_front(self, configs: Sequence[QuantConfig]) -> list[tuple[Latency, Accuracy]]:
        """Like `measure_again`, in a process of its own."""
        return remeasure(self.settings, self.baseline, configs)

    def measure_again(self, configs: Sequence[QuantConfig]) -> list[tuple[Latency, Accuracy]]:
        """Measure configurations again: latency interleaved with float, accuracy on the held-out images."""
        return self.measure_modules_again([self._builder.prepare(config) for config in configs])

    def measure_modules_again(self, modules: Sequence[Prepared]) -> list[tuple[Latency, Accuracy]]:
        """Like `measure_again`, of modules that are there; as often as what reaches a search's front, all of them in turns."""
        image, reference_ms = self.timed_images("search"), self.baseline.latency.median_ms
        handles = [self.device.handle(one) for one in modules]
        rounds = [self.device.paired(self._reference, handles, image, reference_ms) for _ in range(1 + AGAIN)]
        latencies = [middle_of(timings) for timings in zip(*rounds, strict=True)]
        return [(latency, self.accuracy(module, "heldout")) for latency, module in zip(latencies, modules, strict=True)]

    def float_logits(self, part: str) -> np.ndarray:
        """Logits of the float module, float32 (N, classes), computed once."""
        if part not in self._float_logits:
            self._float_logits[part] = self.logits(self.compile(FLOAT), part)
        return self._float_logits[part]
