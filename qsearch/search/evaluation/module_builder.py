"""From a configuration to its linked module: the part of a trial that needs neither images nor a quiet machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qsearch.build.cache import KernelCache
from qsearch.build.link import CompiledModule, Linker
from qsearch.build.packed import pack_module
from qsearch.build.target import Target
from qsearch.calibrate.ranges import activation_ranges
from qsearch.config import QuantConfig
from qsearch.measure.clock import Clock
from qsearch.measure.measurement import Memory
from qsearch.measure.memory import measure_memory
from qsearch.quantize.lower import lower
from qsearch.quantize.program import Program
from qsearch.quantize.rounding.learned_config import learned_layers
from qsearch.quantize.variants import Variants
from qsearch.search.evaluation.requirements import require_precisions, require_room

__all__ = ["ModuleBuilder", "Prepared"]


@dataclass(frozen=True)
class Prepared:
    """A linked module, ready to be timed.

    Attributes:
        open: Makes a virtual machine of it.
        memory: The bytes it needs.
        kernels_sha256: Digest of its kernels.
        seconds: Wall time of lower and build.
    """

    open: Callable[[], Any]
    memory: Memory
    kernels_sha256: str
    seconds: dict[str, float] = field(default_factory=dict)


class ModuleBuilder:
    """Lowers and links configurations of one model.

    Args:
        variants: The imported model, and what the methods of a configuration make of it.
        value_range: (low, high) of its input.
        target: What to compile for.
        cache_dir: Where kernels are kept.
    """

    def __init__(self, variants: Variants, value_range: tuple[float, float], target: Target, cache_dir: Path) -> None:
        self.variants, self.value_range, self.cache_dir, self.target = variants, value_range, cache_dir, target
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
        require_precisions(self.target, {name: (one.precision,) for name, one in layers.items()}, "the configuration")
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
        module = self.build(program)
        clock.lap("build")
        return Prepared(module.open, measure_memory(module), module.kernels_sha256, clock.seconds)

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
        module = self.build(program, linked=False)
        name = f"{'kept-' if kept else ''}{config.content_hash()[:24]}.module"
        packed = pack_module(module, folder / name, kept)
        # TVM does not notice that the disk fills up while it writes. Half a module would fail where it is opened, and look
        # like this configuration's fault.
        require_room(folder)
        clock.lap("build")
        return Prepared(packed.open, measure_memory(module), module.kernels_sha256, clock.seconds)
