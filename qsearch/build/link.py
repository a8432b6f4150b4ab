"""Link a program's kernels into a Relax executable.

The Relax function only calls kernels by symbol, in order; the values between them have fixed places in one arena.
Building it takes tens of milliseconds, because no kernel is compiled here.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qsearch.build.cache import FOREIGN, CompiledKernel, KernelCache, kernel_symbol, static_modules
from qsearch.build.foreign import legalize
from qsearch.build.machine import Machine
from qsearch.build.relax_module import Call, Constant, ModuleWriter, place_values
from qsearch.build.target import Tile
from qsearch.build.tiles import TileChoices
from qsearch.errors import BuildError
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import Op, OpKey, Program

__all__ = ["CompiledModule", "Linker", "PlannedCall", "ProgramPlan"]


@dataclass(frozen=True)
class CompiledModule:
    """A program, compiled.

    Attributes:
        program: What it computes.
        executable: The Relax executable, its kernels imported.
        arena_bytes: The memory that its values share, all but the input and the output.
        kernels: The kernels it calls.
        weight_bytes: Bytes of its packed constants.
        workspace_bytes: Largest scratch buffer of a kernel.
        device: 'cpu' or 'cuda'.
    """

    program: Program
    executable: Any
    arena_bytes: int
    kernels: tuple[CompiledKernel, ...]
    weight_bytes: int
    workspace_bytes: int
    device: str = "cpu"

    @property
    def objects(self) -> list[Path]:
        """Object files of its kernels."""
        return [kernel.object_path for kernel in self.kernels]

    @property
    def addons(self) -> list[str]:
        """What an export must be linked with beside the executable; GPU kernels are part of what it imports."""
        return [str(file) for file in self.objects] if self.device == "cpu" else []

    @property
    def kernels_sha256(self) -> str:
        """Digest of its kernels: two modules with one digest run the same code."""
        return _symbols_digest(kernel.symbol for kernel in self.kernels)

    def open(self) -> Machine:
        """A virtual machine of its own, on the device that it was compiled for."""
        return Machine(self.executable.mod, self.device)


@dataclass(frozen=True)
class PlannedCall:
    """A call of a kernel: the operation it belongs to, the kernel's symbol, the bytes of the constants it reads."""

    op: Op
    symbol: str
    constant_bytes: int


@dataclass(frozen=True)
class ProgramPlan:
    """What is known of a program's module without building it.

    Attributes:
        calls: In order.
        weight_bytes: As in CompiledModule.
        arena_bytes: As in CompiledModule.
        workspace_bytes: As in CompiledModule.
    """

    calls: tuple[PlannedCall, ...]
    weight_bytes: int
    arena_bytes: int
    workspace_bytes: int


class Linker:
    """Builds programs for one target; keeps packed weights as long as those that they were packed from.

    Args:
        cache: Where kernels come from.
        captures: On a GPU, launch a module's kernels as one captured graph from the second call on.
    """

    def __init__(self, cache: KernelCache, captures: bool = True) -> None:
        self.cache, self.target, self.captures = cache, cache.target, captures
        self.tiles = TileChoices(cache.directory, cache.target)
        self._described: dict[OpKey, tuple[str, Kernel]] = {}
        # By the id of the source array, which is its own as long as that lives, and so does the packed one.
        self._packed: dict[tuple[tuple, int], Constant] = {}
        # Kernel symbol -> bytes of its constants, which its code fixes.
        self._sizes: dict[str, tuple[int, ...]] = {}

    def build(
        self, program: Program, linked: bool = True, exported: bool = False, calls: Sequence[Call] | None = None
    ) -> CompiledModule:
        """Compile a program.

        Args:
            program: The program.
            linked: Import the loaded kernels; without them the executable can be exported with their objects.
            exported: Import what an export needs beside the objects: GPU kernels and what launches them.
            calls: Its kernel calls, where they are not those of `calls` to the letter: with other constants, for instance.

        Raises:
            BuildError: A kernel or the module does not compile.
        """
        import tvm
        from tvm import relax

        calls = [call for _, call in self.calls(program.ops)] if calls is None else calls
        compiled = self.cache.get((call.symbol, call.kernel) for call in calls)
        writer = ModuleWriter(program, calls)
        module = writer.write()
        if linked:
            libraries = {id(kernel.library): kernel.library for kernel in compiled.values()}
            module = module.with_attr("external_mods", list(libraries.values()))
        elif exported and self.target.arch:
            objects = {symbol: kernel.object_path for symbol, kernel in compiled.items()}
            on_gpu = {symbol: kernel.gpu_module for symbol, kernel in compiled.items()}
            module = module.with_attr("external_mods", [static_modules(objects, on_gpu)])
        options = {"relax.backend.use_cuda_graph": self.captures} if self.target.arch else {}
        try:
            with tvm.transform.PassContext(config=options):
                executable = relax.build(module, target=self.target.tvm())
        except RuntimeError as error:  # what TVM raises for its own failures
            raise BuildError(f"TVM cannot build the module: {str(error).strip().splitlines()[-1]}") from error
        workspace = max((call.kernel.workspace_bytes for call in calls), default=0)
        kernels, arena = tuple(compiled.values()), writer.arena.bytes
        return CompiledModule(program, executable, arena, kernels, writer.constant_bytes, workspace, self.target.device)

    def plan(self, program: Program) -> ProgramPlan:
        """Kernels and memory of a program; nothing is compiled, and packed only what the first call of a kernel needs."""
        sized: dict[tuple[tuple, int], Constant] = {}
        calls = [(op, call) for op in program.ops for call in self._calls(op, sized)]
        constants = {id(one): one.bytes for _, call in calls for one in call.constants}
        arena = place_values([call for _, call in calls], program.output.name).bytes
        workspace = max((call.kernel.workspace_bytes for _, call in calls), default=0)
        planned = tuple(PlannedCall(op, call.symbol, sum(one.bytes for one in call.constants)) for op, call in calls)
        return ProgramPlan(planned, sum(constants.values()), arena, workspace)

    def calls(self, ops: Iterable[Op]) -> list[tuple[Op, Call]]:
        """The kernel calls of operations, each with its operation; nothing is compiled."""
        return [(op, call) for op in ops for call in self._calls(op)]

    def candidates(self, key: OpKey, count: int) -> list[tuple[str, Kernel, Tile | None]]:
        """Kernels for an operation of one's own, with their symbols and tiles: the one that is used, then others to time."""
        symbol, kernel = self._describe(key)
        target = self.target
        found: dict[str, tuple[str, Kernel, Tile | None]] = {}
        tiles = target.candidate_tiles(key, count) if key.kind == "conv2d" else []
        for tile in tiles:
            other = target.describe(key, tile)
            found.setdefault(name := kernel_symbol(other, target), (name, other, tile))
        # A tile that was tuned need not be among the predicted ones.
        used = found.pop(symbol, (symbol, kernel, self.tiles.get(key) if tiles else None))
        return [used, *list(found.values())[: count - 1]]

    def kernels_sha256(self, program: Program) -> str:
        """What `CompiledModule.kernels_sha256` would be if the program were built now; nothing is compiled."""
        own = {self._describe(op.key)[0] for op in program.ops if op.key.kind != "foreign"}
        foreign = {call.symbol for op in program.ops if op.key.kind == "foreign" for call in self._foreign_calls(op)}
        return _symbols_digest(own | foreign)

    def remember_tile(self, key: OpKey, tile: Tile) -> None:
        """Use a tile from now on for operations of this geometry and precision."""
        self.tiles.put(key, tile)
        self._described.clear()

    def _describe(self, key: OpKey) -> tuple[str, Kernel]:
        if key not in self._described:
            tile = self.tiles.get(key) if key.kind == "conv2d" else None
            kernel = self.target.describe(key, tile)
            self._described[key] = kernel_symbol(kernel, self.target), kernel
        return self._described[key]

    def _calls(self, op: Op, sized: dict[tuple[tuple, int], Constant] | None = None) -> Iterator[Call]:
        """The kernel calls of an operation; where `sized` is given, of the right size alone, the weights among it."""
        if op.key.kind == "foreign":
            yield from self._foreign_calls(op)
            return
        symbol, kernel = self._describe(op.key)
        constants = (
            self._packed_constants(symbol, kernel, op.constants)
            if sized is None
            else self._sized_constants(symbol, kernel, op.constants, sized)
        )
        shapes = tuple((int(np.prod(shape)),) for shape in op.key.shapes[:-1])
        yield Call(kernel, symbol, (*op.inputs, *constants), shapes, op.output.name, (op.output.size,), op.output.dtype)

    def _packed_constants(self, symbol: str, kernel: Kernel, constants: dict[str, np.ndarray]) -> list[Constant]:
        found = [Constant(array) for array in kernel.pack(constants)]
        if kernel.pack_weight is not None:
            found.insert(0, self._packed_weight(kernel, constants))
        self._sizes[symbol] = tuple(one.bytes for one in found)
        return found

    def _sized_constants(
        self, symbol: str, kernel: Kernel, constants: dict[str, np.ndarray], sized: dict[tuple[tuple, int], Constant]
    ) -> list[Constant]:
        """Constants of a kernel without content; a weight that two operations share is one here too."""
        if symbol not in self._sizes:
            self._packed_constants(symbol, kernel, constants)
        found = [Constant(np.broadcast_to(np.uint8(0), size)) for size in self._sizes[symbol]]
        if kernel.pack_weight is not None:
            found[0] = sized.setdefault((kernel.variant, id(constants["weight"])), found[0])
        return found

    def _packed_weight(self, kernel: Kernel, constants: dict[str, np.ndarray]) -> Constant:
        assert kernel.pack_weight is not None
        weight = constants["weight"]
        key = (kernel.variant, id(weight))
        if key not in self._packed:
            self._packed[key] = Constant(kernel.pack_weight(constants))
            weakref.finalize(weight, self._packed.pop, key, None).atexit = False
        return self._packed[key]

    def _foreign_calls(self, op: Op) -> Iterator[Call]:
        parameters = tuple((name, array.shape, array.dtype.name) for name, array in sorted(op.constants.items()))
        steps = legalize(op.key, parameters)
        names: dict[str, Any] = {f"input{i}": name for i, name in enumerate(op.inputs)}
        shapes = {f"input{i}": shape for i, shape in enumerate(op.key.shapes[:-1])}
        for name, array in (op.constants | steps.constants).items():
            names[name] = Constant(array)
        for step in steps.calls:
            names[step.output] = op.output.name if step.output == steps.output else f"{op.output.name}.{step.output}"
            shapes[step.output] = step.shape
            kernel = Kernel(op.key, (FOREIGN, step.text), step.generate, lambda constants: ())
            arguments = tuple(names[name] for name in step.inputs)
            given = tuple(shapes.get(name, ()) for name in step.inputs)
            yield Call(kernel, kernel_symbol(kernel, self.target), arguments, given, names[step.output], step.shape, step.dtype)


def _symbols_digest(symbols: Iterable[str]) -> str:
    """Symbols are digests of what determines a kernel's code, its tile and its generator's source included."""
    return hashlib.sha256(" ".join(sorted(symbols)).encode()).hexdigest()
