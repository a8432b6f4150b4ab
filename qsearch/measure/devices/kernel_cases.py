"""What a kernel is checked with: random inputs with edge values among them, and the outputs of the NumPy reference."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qsearch.build.cache import compile_kernel
from qsearch.build.link import Linker
from qsearch.build.relax_module import Call, Constant
from qsearch.build.target import open_target
from qsearch.kernels.description import Kernel
from qsearch.qtype import PRECISIONS
from qsearch.quantize.program import FLOATS, INTEGER_DTYPES, INTEGERS, Op, Program
from qsearch.quantize.reference import run_op

__all__ = ["KernelCase", "kernel_cases", "tolerance_of"]

# Largest difference of a float output, as a share of its largest magnitude: float sums round by their order, and what is
# then rounded to a short float may fall to either side.
FLOAT_TOLERANCE = {"float16": 1e-3, "float8_e4m3fn": 0.07}
OTHER_TOLERANCE = 1e-4
# Functions of float are another library's on every machine.
FUNCTION_TOLERANCE = 1e-3
# Operations whose float32 arithmetic is written down step by step, so that every target rounds alike.
STEPWISE = frozenset(
    {"to_channels_last", "to_channels_first", "quantize", "dequantize", "requantize", "add", "mul", "max_pool2d"}
    | {"concat", "lookup", "gather", "scale", "shift"}
)
FUNCTIONS = frozenset({"activation", "layer_norm", "softmax", "l2_normalize", "foreign"})
# Of a value, the first eighths hold one edge each: all windows of a convolution saturate there.
EDGE_SHARE = 8

Range = tuple[int, int, int]


@dataclass(frozen=True)
class KernelCase:
    """One kernel with arguments and the output that it must give.

    Attributes:
        symbol: Its name.
        kernel: How it is generated.
        what: What it computes, for people.
        operation: Digest of the operation: kernels that differ in their tile only share it.
        arguments: In call order, all but the output.
        expected: The output.
        tolerance: Largest difference of a float output as a share of its largest magnitude; None where every bit counts.
            An integer output of an inexact kernel may be off by one.
        tile: Its register tile; None where there is nothing to choose.
        tile_group: What kernels that share their tile have in common; '' where there is nothing to choose.
    """

    symbol: str
    kernel: Kernel
    what: str
    operation: str
    arguments: tuple[np.ndarray, ...]
    expected: np.ndarray
    tolerance: float | None
    tile: dict[str, Any] | None = None
    tile_group: str = ""


def kernel_cases(linker: Linker, programs: Iterable[Program], tiles: int = 1, seed: int = 0) -> Iterator[KernelCase]:
    """A case for every distinct kernel of some programs.

    Args:
        linker: Of the target.
        programs: That between them have all kernels.
        tiles: Register tiles of every dense convolution, the predicted best first.
        seed: Of the inputs.
    """
    seen: set[str] = set()
    for program in programs:
        ranges = value_ranges(program)
        for op in program.ops:
            rng = np.random.default_rng(seed)
            made = (
                _foreign_cases(linker, op, rng) if op.key.kind == "foreign" else _own_cases(linker, op, ranges, tiles, seen, rng)
            )
            for case in made:
                if case.symbol not in seen:
                    seen.add(case.symbol)
                    yield case


def tolerance_of(op: Op) -> float | None:
    """How far an operation's output may be from the reference's; None where every bit counts."""
    key = op.key
    if key.kind in FUNCTIONS:
        return None if key.function == "clip" else FUNCTION_TOLERANCE
    in_integers = key.precision is not None and PRECISIONS[key.precision].is_integer
    averages = key.kind == "avg_pool2d" and key.dtypes[0] in INTEGER_DTYPES
    exact = key.kind in STEPWISE or in_integers or averages
    return None if exact else FLOAT_TOLERANCE.get(op.output.dtype, OTHER_TOLERANCE)


def value_ranges(program: Program) -> dict[str, Range]:
    """Least, largest and zero of every integer value: what its operation can write, which bounds the sums that read it."""
    found: dict[str, Range] = {}
    for op in program.ops:
        if op.output.dtype not in INTEGER_DTYPES or op.key.kind == "foreign":
            continue
        if op.key.kind == "lookup":
            table = op.constants["table"]
            found[op.output.name] = (int(table.min()), int(table.max()), int(table[0]))
            continue
        if op.key.kind in ("max_pool2d", "gather") or "integers" not in op.constants:
            found[op.output.name] = found[op.inputs[0]]
            continue
        zero, low, high = (_integer(op, name) for name in ("zero_point", "qmin", "qmax"))
        copied = [found[name] for name, copies in zip(op.inputs, op.key.copies, strict=False) if copies]
        found[op.output.name] = (min([low, *(one[0] for one in copied)]), max([high, *(one[1] for one in copied)]), zero)
    return found


def _integer(op: Op, name: str) -> int:
    return int(op.constants["integers"][INTEGERS.index(name)])


def _own_cases(
    linker: Linker, op: Op, ranges: dict[str, Range], tiles: int, seen: set[str], rng: np.random.Generator
) -> Iterator[KernelCase]:
    variants = [one for one in linker.candidates(op.key, tiles) if one[0] not in seen]
    if not variants:
        return
    key = op.key
    inputs = [
        _values(rng, shape, dtype, ranges.get(name), _step(op))
        for name, shape, dtype in zip(op.inputs, key.shapes, key.dtypes, strict=False)
    ]
    expected = np.ascontiguousarray(run_op(op, inputs)).ravel()
    what = f"{key.kind} {key.precision or key.function or key.dtypes[0]} {key.shapes[0]} -> {key.shapes[-1]}"
    operation = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    for symbol, kernel, tile in variants:
        constants = list(kernel.pack(op.constants))
        if kernel.pack_weight is not None:
            constants.insert(0, kernel.pack_weight(op.constants))
        arguments = tuple(np.ascontiguousarray(one) for one in (*(value.ravel() for value in inputs), *constants))
        group = "" if tile is None else linker.tiles.name(key)
        plain = None if tile is None else asdict(tile)
        yield KernelCase(symbol, kernel, what, operation, arguments, expected, tolerance_of(op), plain, group)


def _step(op: Op) -> float:
    """What float inputs are multiples of where an operation rounds them to integers: halves of it are ties."""
    if op.key.kind not in ("quantize", "to_channels_last") or op.output.dtype not in INTEGER_DTYPES:
        return 0.0
    return 1.0 / float(op.constants["floats"][FLOATS.index("multiplier")])


def _values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, limits: Range | None, step: float) -> np.ndarray:
    """Random values with edges among them.

    Args:
        rng: Source of randomness.
        shape: Theirs.
        dtype: Theirs.
        limits: Of integers.
        step: The scale that floats are rounded by; 0 for none.
    """
    size = int(np.prod(shape))
    part = size // EDGE_SHARE
    if dtype not in INTEGER_DTYPES:
        values = rng.standard_normal(size) * (64 * step if step else 1.0)
        values[:part] = 0.0
        if step:
            values[part : 2 * part] = 1e4 * step
            values[2 * part : 3 * part] = -1e4 * step
            values[3 * part : 4 * part] = step * (rng.integers(-100, 100, part) + 0.5)
        return values.astype(dtype).reshape(shape)
    low, high, zero = limits or (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max), 0)
    integers = rng.integers(low, high + 1, size)
    for i, edge in enumerate((high, low, zero)):
        integers[i * part : (i + 1) * part] = edge
    for edge in (low, high, zero, min(max(0, low), high)):
        integers[rng.integers(size)] = edge
    return integers.astype(dtype).reshape(shape)


def _foreign_cases(linker: Linker, op: Op, rng: np.random.Generator) -> Iterator[KernelCase]:
    """The loop nests of a foreign operator; there is no reference of them but TVM's own code on this machine."""
    import tvm

    values: dict[str, np.ndarray] = {
        name: _values(rng, shape, dtype, None, 0.0)
        for name, shape, dtype in zip(op.inputs, op.key.shapes, op.key.dtypes, strict=False)
    }
    for _, call in linker.calls([op]):
        arguments = tuple(_argument(values, argument, call, i) for i, argument in enumerate(call.arguments))
        compiled = compile_kernel(call.kernel, call.symbol, open_target("host"))
        output = tvm.runtime.tensor(np.zeros(call.shape, call.dtype))
        compiled.mod[call.symbol](*(tvm.runtime.tensor(one) for one in arguments), output)
        values[call.output] = output.numpy()
        what = f"{op.key.foreign.target if op.key.foreign else op.key.kind} -> {call.shape}"
        yield KernelCase(call.symbol, call.kernel, what, call.symbol, arguments, output.numpy(), FUNCTION_TOLERANCE)


def _argument(values: dict[str, np.ndarray], argument: str | Constant, call: Call, place: int) -> np.ndarray:
    if isinstance(argument, Constant):
        return np.asarray(argument.array, order="C")
    return np.ascontiguousarray(values[argument].reshape(call.shapes[place] or values[argument].shape))


def as_json(case: KernelCase) -> dict[str, Any]:
    """What a pack's manifest says of a case besides its arrays."""
    return {
        "symbol": case.symbol,
        "what": case.what,
        "operation": case.operation,
        "tolerance": case.tolerance,
        "tile": case.tile,
        "tile_group": case.tile_group,
    }
