"""Write the Relax function that calls a program's kernels, its values in fixed places of one arena."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qsearch.build.arena import Arena, Lifetime, plan_arena
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import Program

__all__ = ["Call", "Constant", "ModuleWriter", "place_values"]


@dataclass(frozen=True, eq=False)
class Constant:
    """An array that kernels read; told apart by identity."""

    array: np.ndarray

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.array.nbytes

    @cached_property
    def expression(self) -> Any:
        """A Relax constant that holds a copy; planning does without."""
        import tvm
        from tvm import relax

        return relax.const(tvm.runtime.tensor(np.asarray(self.array, order="C")))


@dataclass(frozen=True)
class Call:
    """One kernel call: arguments are names of values or constants, with the shapes the kernel declares."""

    kernel: Kernel
    symbol: str
    arguments: tuple[str | Constant, ...]
    shapes: tuple[tuple[int, ...], ...]
    output: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def constants(self) -> list[Constant]:
        """Those of its arguments that are constants."""
        return [argument for argument in self.arguments if isinstance(argument, Constant)]

    @property
    def bytes(self) -> int:
        """Size of the output."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def place_values(calls: Sequence[Call], output: str) -> Arena:
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


class ModuleWriter:
    """Writes the Relax function that calls the kernels."""

    def __init__(self, program: Program, calls: Sequence[Call]) -> None:
        from tvm import relax

        self.program, self.calls, self.builder = program, calls, relax.BlockBuilder()
        self.arena = place_values(calls, program.output.name)
        self.dtypes = {call.output: call.dtype for call in calls}
        # (what it is part of, shape, dtype) -> tensor; a value that follows another in its place takes over its tensor.
        self.tensors: dict[tuple[int | str, tuple[int, ...], str], Any] = {}
        self.constants: dict[int, Constant] = {}
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

    def _emit(self, call: Call) -> None:
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
