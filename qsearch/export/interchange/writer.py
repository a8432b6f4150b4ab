"""Write a program's steps: which tensor holds which value, and how its memory is seen with another shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from qsearch.export.interchange.steps import Step
from qsearch.quantize.affine import Affine
from qsearch.quantize.program import FLOATS, INTEGER_DTYPES, INTEGERS, Op, Program

__all__ = ["Rounding", "Tensor", "Writer", "scalar"]

Rounding = Literal["float", "fused", "steps", "sums"]


@dataclass(frozen=True)
class Tensor:
    """A tensor of the translation.

    Attributes:
        name: Its name.
        shape: Physical shape of the value in the program: channels last, unless `planar`.
        planar: Four axes are (N, C, H, W) in the program, too.
    """

    name: str
    shape: tuple[int, ...]
    planar: bool = False


def scalar(op: Op, name: str) -> float:
    """A scalar argument of an operation."""
    if name in INTEGERS:
        return int(op.constants["integers"][INTEGERS.index(name)])
    return float(op.constants["floats"][FLOATS.index(name)])


class Writer:
    """The steps while they are being written.

    Args:
        program: What is translated.
        rounding: As of `translate`.
    """

    def __init__(self, program: Program, rounding: Rounding) -> None:
        self.program, self.rounding = program, rounding
        self.steps: list[Step] = []
        self.constants: dict[str, np.ndarray] = {}
        given = program.input
        # By value: what holds it, integers where it has integers.
        self.held: dict[str, Tensor] = {given.name: Tensor(given.name, given.shape, planar=True)}
        self.dtypes = {given.name: given.dtype} | {op.output.name: op.output.dtype for op in program.ops}
        self.layer = ""
        self._names = {given.name}
        self._seen: dict[tuple[str, tuple[int, ...], float | None], Tensor] = {}

    def step(self, op: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Append a step of the layer being written; its output is named after that unless it has a name."""
        output = self._unique(name or f"{self.layer}/{op}")
        self.steps.append(Step(op, inputs, output, self.layer, attributes))
        return output

    def constant(self, name: str, array: np.ndarray) -> str:
        """Add a constant of the layer being written."""
        unique = self._unique(f"{self.layer}/{name}")
        self.constants[unique] = np.ascontiguousarray(array) if array.ndim else array
        return unique

    def affine(self, value: str) -> Affine:
        """Scale and zero point of a value that is not float32."""
        return self.program.affines[value]

    def real(self, value: str, shape: tuple[int, ...], step: float | None = None) -> str:
        """The real numbers of a value, its memory seen with a physical shape; four axes are given as (N, C, H, W).

        Args:
            value: The value.
            shape: As the operation that reads it sees it.
            step: What one step of integers counts as; None for their scale.
        """
        key = value, shape, step
        if key not in self._seen:
            held = self.held[value]
            whole = value, held.shape, step
            if whole not in self._seen:
                name = held.name
                if self.dtypes[value] in INTEGER_DTYPES:
                    stored = self.affine(value)
                    affine = stored if step is None else replace(stored, scale=np.float32(step))
                    name = self.step("Dequantize", name, name=f"{name}.real", affine=affine, stored=stored)
                self._seen[whole] = Tensor(name, held.shape, held.planar)
            self._seen[key] = self.reshape(self._seen[whole], shape)
        return self._seen[key].name

    def reshape(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The same memory under another physical shape."""
        if tensor.shape == shape:
            return tensor
        name = tensor.name
        if len(tensor.shape) == 4 and not tensor.planar and not _order_is_free(tensor.shape):
            name = self.step("Transpose", name, perm=(0, 2, 3, 1))
        last = len(shape) == 4 and not _order_is_free(shape)
        seen = shape if last or len(shape) != 4 else (shape[0], shape[3], shape[1], shape[2])
        name = self.step("Reshape", name, shape=seen)
        return Tensor(self.step("Transpose", name, perm=(0, 3, 1, 2)) if last else name, shape)

    def write(self, op: Op, real: str, shape: tuple[int, ...], clips: bool = True, steps: bool = False) -> None:
        """Write an operation's output.

        Args:
            op: The operation.
            real: Its result in real numbers.
            shape: Physical shape of that.
            clips: The operation has clip bounds of its own; what only moves values has none.
            steps: The result counts steps of the output instead.
        """
        output = op.output
        if output.dtype in INTEGER_DTYPES:
            affine = self.affine(output.name)
            qmin, qmax = affine.limits.qmin, affine.limits.qmax
            if clips:
                qmin, qmax = max(qmin, int(scalar(op, "qmin"))), min(qmax, int(scalar(op, "qmax")))
            made = self.reshape(Tensor(real, shape), output.shape)
            given = replace(affine, scale=np.float32(1)) if steps else affine
            bounds = {"qmin": qmin, "qmax": qmax}
            self.hold(op, self.step("Quantize", made.name, name=output.name, affine=given, stored=affine, **bounds))
            return
        if clips and (op.key.clipped or output.dtype == "float16"):
            real = self.step("Clip", real, low=scalar(op, "low"), high=scalar(op, "high"))
        if output.dtype == "float16":
            real = self.step("Half", real)
        self.hold(op, self.reshape(Tensor(real, shape), output.shape).name)

    def hold(self, op: Op, name: str, planar: bool = False) -> None:
        """Let a tensor hold an operation's output."""
        self.held[op.output.name] = Tensor(name, op.output.shape, planar)

    def _unique(self, name: str) -> str:
        found, count = name, 1
        while found in self._names:
            count += 1
            found = f"{name}.{count}"
        self._names.add(found)
        return found


def _order_is_free(shape: tuple[int, ...]) -> bool:
    """Channels first and channels last are the same memory: (N, H, W, C) has one pixel or one channel."""
    return shape[1] * shape[2] == 1 or shape[3] == 1
