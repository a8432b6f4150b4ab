"""Link a program's kernels into a Relax executable.

The Relax function only calls kernels by symbol, in order; the values between them have fixed places in one arena.
Building it takes tens of milliseconds, because no kernel is compiled here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qsearch.build.arena import Arena, Lifetime, plan_arena
from qsearch.build.cache import CompiledKernel, KernelCache, kernel_symbol
from qsearch.build.foreign import legalize
from qsearch.build.tiles import TileChoices
from qsearch.errors import BuildError
from qsearch.kernels.cpu import Tile, describe_kernel
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import Op, OpKey, Program

__all__ = ["CompiledModule", "Linker"]


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
    """

    program: Program
    executable: Any
    arena_bytes: int
    kernels: tuple[CompiledKernel, ...]
    weight_bytes: int
    workspace_bytes: int

    @property
    def objects(self) -> list[Path]:
        """Object files of its kernels."""
        return [kernel.object_path for kernel in self.kernels]

    @property
    def kernels_sha256(self) -> str:
        """Digest of its kernels: two modules with one digest run the same code."""
        return _symbols_digest(kernel.symbol for kernel in self.kernels)

    def open(self) -> Any:
        """A virtual machine of its own, on the CPU."""
        import tvm
        from tvm import relax

        return relax.VirtualMachine(self.executable.mod, tvm.cpu())


@dataclass(frozen=True)
class _Constant:
    """A Relax constant and its size."""

    expression: Any
    bytes: int


@dataclass(frozen=True)
class _Call:
    """One kernel call: arguments are names of values or constants, with the shapes the kernel declares."""

    kernel: Kernel
    symbol: str
    arguments: tuple[str | _Constant, ...]
    shapes: tuple[tuple[int, ...], ...]
    output: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Size of the output."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class Linker:
    """Builds programs for one target; keeps packed weights between trials.

    Args:
        cache: Where kernels come from.
    """

    def __init__(self, cache: KernelCache) -> None:
        self.cache, self.target = cache, cache.target
        self.tiles = TileChoices(cache.directory, cache.target)
        self._described: dict[OpKey, tuple[str, Kernel]] = {}
        # The source array is kept beside the packed one, so that its id stays its own.
        self._packed: dict[tuple[tuple, int], tuple[np.ndarray, _Constant]] = {}

    def build(self, program: Program, linked: bool = True) -> CompiledModule:
        """Compile a program.

        Args:
            program: The program.
            linked: Import the loaded kernels; without them the executable can be exported with their objects.

        Raises:
            BuildError: A kernel or the module does not compile.
        """
        from tvm import relax

        calls = [call for op in program.ops for call in self._calls(op)]
        compiled = self.cache.get((call.symbol, call.kernel) for call in calls)
        writer = _ModuleWriter(program, calls)
        module = writer.write()
        if linked:
            libraries = {id(kernel.library): kernel.library for kernel in compiled.values()}
            module = module.with_attr("external_mods", list(libraries.values()))
        try:
            executable = relax.build(module, target=self.target.tvm())
        except RuntimeError as error:  # what TVM raises for its own failures
            raise BuildError(f"TVM cannot build the module: {str(error).strip().splitlines()[-1]}") from error
        workspace = max((call.kernel.workspace_bytes for call in calls), default=0)
        kernels, arena = tuple(compiled.values()), writer.arena.bytes
        return CompiledModule(program, executable, arena, kernels, writer.constant_bytes, workspace)

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
            kernel = describe_kernel(key, self.target.isa, self.target.threads, tile)
            self._described[key] = kernel_symbol(kernel, self.target), kernel
        return self._described[key]

    def _calls(self, op: Op) -> Iterator[_Call]:
        if op.key.kind == "foreign":
            yield from self._foreign_calls(op)
            return
        symbol, kernel = self._describe(op.key)
        constants = [_constant(array) for array in kernel.pack(op.constants)]
        if kernel.pack_weight is not None:
            constants.insert(0, self._packed_weight(kernel, op.constants["weight"]))
        shapes = tuple((int(np.prod(shape)),) for shape in op.key.shapes[:-1])
        yield _Call(kernel, symbol, (*op.inputs, *constants), shapes, op.output.name, (op.output.size,), op.output.dtype)

    def _packed_weight(self, kernel: Kernel, weight: np.ndarray) -> _Constant:
        assert kernel.pack_weight is not None
        key = (kernel.variant, id(weight))
        if key not in self._packed:
            self._packed[key] = weight, _constant(kernel.pack_weight(weight))
        return self._packed[key][1]

    def _foreign_calls(self, op: Op) -> Iterator[_Call]:
        parameters = tuple((name, array.shape, array.dtype.name) for name, array in sorted(op.constants.items()))
        steps = legalize(op.key, parameters)
        names: dict[str, Any] = {f"input{i}": name for i, name in enumerate(op.inputs)}
        shapes = {f"input{i}": shape for i, shape in enumerate(op.key.shapes[:-1])}
        for name, array in (op.constants | steps.constants).items():
            names[name] = _constant(array)
        for step in steps.calls:
            names[step.output] = op.output.name if step.output == steps.output else f"{op.output.name}.{step.output}"
            shapes[step.output] = step.shape
            kernel = Kernel(op.key, ("foreign", step.text), step.generate, lambda constants: ())
            arguments = tuple(names[name] for name in step.inputs)
            given = tuple(shapes.get(name, ()) for name in step.inputs)
            yield _Call(kernel, kernel_symbol(kernel, self.target), arguments, given, names[step.output], step.shape, step.dtype)


def _symbols_digest(symbols: Iterable[str]) -> str:
    """Symbols are digests of what determines a kernel's code, its tile and its generator's source included."""
    return hashlib.sha256(" ".join(sorted(symbols)).encode()).hexdigest()


def _constant(array: np.ndarray) -> _Constant:
    """A Relax constant that holds a copy of an array."""
    import tvm
    from tvm import relax

    return _Constant(relax.const(tvm.runtime.tensor(np.asarray(array, order="C"))), array.nbytes)


def _plan(calls: Sequence[_Call], output: str) -> Arena:
    """Places of all values but the input and the output, which outlive the call.

    What a kernel can write over one of its inputs takes that input's place, if nothing reads the input any more.
    """
    first = {call.output: step for step, call in enumerate(calls) if call.output != output}
    last = dict(first)
    for step, call in enumerate(calls):
        last |= {name: step for name in call.arguments if isinstance(name, str) and name in first}
    place = {name: name for name in first}
    for step, call in enumerate(calls):
        over = None if call.kernel.writes_over is None else call.arguments[call.kernel.writes_over]
        if call.output in place and over in place and last[over] == step and call.arguments.count(over) == 1:
            place[call.output] = place[over]
            last[place[over]] = last[call.output]
    sizes = {call.output: call.bytes for call in calls}
    arena = plan_arena(Lifetime(name, sizes[name], first[name], last[name]) for name in first if place[name] == name)
    return Arena(arena.bytes, {name: arena.offsets[root] for name, root in place.items()})


class _ModuleWriter:
    """Writes the Relax function that calls the kernels."""

    def __init__(self, program: Program, calls: Sequence[_Call]) -> None:
        from tvm import relax

        self.program, self.calls, self.builder = program, calls, relax.BlockBuilder()
        self.arena = _plan(calls, program.output.name)
        self.dtypes = {call.output: call.dtype for call in calls}
        # (what it is part of, shape, dtype) -> tensor; a value that follows another in its place takes over its tensor.
        self.tensors: dict[tuple[int | str, tuple[int, ...], str], Any] = {}
        self.constants: dict[int, _Constant] = {}
        self.storage: Any = None

    @property
    def constant_bytes(self) -> int:
        """Bytes of the distinct constants that the calls read."""
        return sum(constant.bytes for constant in self.constants.values())

    def write(self) -> Any:
        """A module with one function, main: float32 (N, C, H, W) -> float32 (N, classes)."""
        from tvm import relax

        given, output = self.program.input, self.program.output
        image = relax.Var("image", relax.TensorType(given.shape, given.dtype))
        self.tensors[given.name, given.shape, given.dtype] = image
        self.dtypes[given.name] = given.dtype
        with self.builder.function("main", [image], pure=False):
            if self.arena.bytes:
                size = relax.ShapeExpr((self.arena.bytes,))
                self.storage = self.builder.emit(relax.op.memory.alloc_storage(size, 0, "global", "uint8"))
            for call in self.calls:
                self._emit(call)
            self.builder.emit_func_output(self._tensor(output.name, output.shape))
        return self.builder.get()

    def _emit(self, call: _Call) -> None:
        from tvm import relax

        arguments = []
        for i, argument in enumerate(call.arguments):
            if isinstance(argument, str):
                arguments.append(self._tensor(argument, call.shapes[i]))
            else:
                self.constants[id(argument)] = argument
                arguments.append(argument.expression)
        if call.output == self.program.output.name:
            made = relax.op.builtin.alloc_tensor(relax.ShapeExpr(call.shape), call.dtype, 0)
            self.tensors[call.output, call.shape, call.dtype] = self.builder.emit(made)
        arguments.append(self._tensor(call.output, call.shape))
        self.builder.emit(relax.Call(relax.ExternFunc(call.symbol), arguments, ty_args=[relax.TupleType([])]))

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Any:
        """A value seen with the shape a kernel declares."""
        from tvm import relax

        offset, dtype = self.arena.offsets.get(name), self.dtypes[name]
        key = (name if offset is None else offset, shape, dtype)
        if key not in self.tensors:
            extents = relax.ShapeExpr(shape)
            if offset is None:
                whole = next(tensor for (part, _, _), tensor in self.tensors.items() if part == name)
                made = relax.op.memory.view(whole, extents)
            else:
                made = relax.op.memory.alloc_tensor(self.storage, offset, extents, dtype)
                if offset:
                    # Kernels expect their buffers to start where the pointer points.
                    made = relax.op.memory.ensure_zero_offset(self.builder.emit(made))
            self.tensors[key] = self.builder.emit(made)
        return self.tensors[key]
