"""From a configuration to its linked module: the part of a trial that needs neither images nor a quiet machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qsearch.build.cache import KernelCache
from qsearch.build.link import CompiledModule, Linker
from qsearch.build.packed import pack_module
from qsearch.build.target import Target
from qsearch.calibrate.ranges import activation_ranges
from qsearch.config import QuantConfig
from qsearch.measure.clock import Clock
from qsearch.measure.devices.device import Away, Prepared
from qsearch.measure.memory import measure_memory, plan_memory
from qsearch.quantize.lower import lower
from qsearch.quantize.program import Program
from qsearch.quantize.rounding.learned_config import learned_layers
from qsearch.quantize.variants import Variants
from qsearch.search.evaluation.requirements import require_precisions, require_room

__all__ = ["ModuleBuilder", "Prepared"]


class ModuleBuilder:
    """Lowers and links configurations of one model.

    Args:
        variants: The imported model, and what the methods of a configuration make of it.
        value_range: (low, high) of its input.
        target: What to compile for.
        cache_dir: Where kernels are kept.
        away: Where modules are timed, if that is not on this machine; `target` is then what they are run for here.
    """

    def __init__(
        self,
        variants: Variants,
        value_range: tuple[float, float],
        target: Target,
        cache_dir: Path,
        away: Away | None = None,
    ) -> None:
        self.variants, self.value_range, self.cache_dir = variants, value_range, cache_dir
        self.target, self.away = target, away
        self.linker = Linker(KernelCache(cache_dir / "kernels", target))
        self._ranges: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}

    def ranges(self, config: QuantConfig) -> dict[str, tuple[float, float]]:
        """Activation ranges of a configuration, computed once for all that share them."""
        variant = self.variants(config)
        key = variant.model.fingerprint, config.ranges_key()
        if key not in self._ranges:
            settings = config.resolve(variant.model.graph.layer_types)
            own = {name: one.calibration for name, one in settings.items() if one.calibration != config.calibration}
            self._ranges[key] = activation_ranges(variant.record, variant.model, config.calibration, self.value_range, own)
        return self._ranges[key]

    def lower(self, config: QuantConfig) -> Program:
        """The program of a configuration.

        Raises:
            TrialError: It cannot be quantized.
            SpaceError: The target has no kernels for one of its precisions.
        """
        variant = self.variants(config)
        layers = config.resolve(variant.model.graph.layer_types)
        target = self.target if self.away is None else self.away.target
        require_precisions(target, {name: (one.precision,) for name, one in layers.items()}, "the configuration")
        model, ranges, weights = variant.model, self.ranges(config), variant.weights
        learned = learned_layers(model, config, ranges, weights, variant.means("measured"))
        return lower(model, config, ranges, weights, variant.means(config.bias_correction), learned)

    def build(self, program: Program, linked: bool = True) -> CompiledModule:
        """Link a program, if there is room for what it may have to compile.

        Args:
            program: The program.
            linked: As for `Linker.build`.

        Raises:
            BuildError: It does not link.
            StudyError: The disk is full.
        """
        require_room(self.cache_dir)
        return self.linker.build(program, linked)

    def prepare(self, config: QuantConfig) -> Prepared:
        """Lower and link one configuration, to be run in this process.

        Raises:
            TrialError: It cannot be quantized or built.
        """
        clock = Clock()
        program = self.lower(config)
        clock.lap("lower")
        return self._linked(self._runnable(config, program), program, clock)

    def prepare_program(self, program: Program) -> Prepared:
        """Link a program that is no configuration's, or a configuration's with other numbers, to be run in this process.

        Raises:
            TrialError: It cannot be built.
        """
        return self._linked(program, program, Clock())

    def _linked(self, runnable: Program, program: Program, clock: Clock) -> Prepared:
        module = self.build(runnable)
        clock.lap("build")
        return self._prepared(module.open, module, program, clock)

    def _runnable(self, config: QuantConfig, program: Program) -> Program:
        """What this machine runs to see the outputs of a program that is timed elsewhere.

        Integers are the same on all targets. Layers in short floats that it has no kernels for compute in fp32 here.
        """
        if self.away is None:
            return program
        layers = config.resolve(self.variants(config).model.graph.layer_types)
        here = {name: one.precision if one.precision in self.target.precisions else "fp32" for name, one in layers.items()}
        if all(here[name] == one.precision for name, one in layers.items()):
            return program
        rules = tuple(rule.model_copy(update={"precision": None}) for rule in config.rules)
        return self.lower(config.model_copy(update={"default_precision": "fp32", "precision": here, "rules": rules}))

    def _prepared(self, open_here: Callable[[], Any], module: CompiledModule, program: Program, clock: Clock) -> Prepared:
        """What is to be measured of a module, or of the program's module elsewhere."""
        if self.away is None:
            return Prepared(open_here, measure_memory(module), module.kernels_sha256, clock.seconds)
        linker = self.away.linker
        made = self.away.prepare(program)
        clock.lap("away")
        memory, digest = plan_memory(linker.plan(program), program), linker.kernels_sha256(program)
        return Prepared(open_here, memory, digest, clock.seconds, made)

    def pack(self, config: QuantConfig, folder: Path, kept: bool = False) -> Prepared:
        """Lower and link one configuration, to be run in another process.

        Args:
            config: The configuration.
            folder: Where its file is written.
            kept: As for `pack_module`.

        Returns:
            Small when pickled.

        Raises:
            TrialError: It cannot be quantized or built.
            StudyError: The disk is full.
        """
        clock = Clock()
        program = self.lower(config)
        clock.lap("lower")
        module = self.build(self._runnable(config, program), linked=False)
        name = f"{'kept-' if kept else ''}{config.content_hash()[:24]}.module"
        packed = pack_module(module, folder / name, kept)
        # TVM does not notice that the disk fills up while it writes. Half a module would fail where it is opened, and look
        # like this configuration's fault.
        require_room(folder)
        clock.lap("build")
        return self._prepared(packed.open, module, program, clock)
