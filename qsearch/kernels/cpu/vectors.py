"""The vector vocabulary that kernel generators share: loads, stores, loops, exact products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.prim_func import kernel

__all__ = [
    "SHARED_ELEMENTS",
    "cast",
    "constant",
    "for_blocks",
    "for_overlapping",
    "for_vectors",
    "kernel",
    "load",
    "loop",
    "narrow",
    "registers",
    "rounded_product",
    "smallest",
    "splat",
    "store",
    "vector_type",
]


# Below about this many elements, starting threads costs more than they save.
SHARED_ELEMENTS = 32768
# Up to this many blocks of a constant extent are written out, each with a constant offset.
MOST_UNROLLED = 8


def constant(value: float, dtype: str, lanes: int = 1) -> Expr:
    """A scalar constant, or a vector of equal constants."""
    scalar = tirx.const(value, dtype)
    return tirx.Broadcast(scalar, lanes) if lanes > 1 else scalar


def load(buffer: tirx.Buffer, index: Expr | int, lanes: int = 1) -> Expr:
    """`lanes` adjacent elements from `index`."""
    return tirx.BufferLoad(buffer, [tirx.Ramp(index, 1, lanes) if lanes > 1 else index])


def store(buffer: tirx.Buffer, index: Expr | int, value: Expr, lanes: int = 1) -> None:
    """Write `lanes` adjacent elements from `index`."""
    T.buffer_store(buffer, value, [tirx.Ramp(index, 1, lanes) if lanes > 1 else index])


def splat(value: Expr, lanes: int) -> Expr:
    """A scalar in every lane."""
    return tirx.Broadcast(value, lanes) if lanes > 1 else value


def registers(count: int, dtype: str) -> tirx.Buffer:
    """Local variables of a vector dtype, addressed by constants.

    They are kept on the stack, from where LLVM moves them to registers. Left to TVM they become workspace: memory
    that, in a parallel loop, LLVM must write at every step because it cannot rule out that others see it.
    """
    return T.alloc_buffer((count,), dtype, scope="local", layout=None, annotations={"disable_lower_builtin": True})


def smallest(a: Expr | int, b: int) -> Expr | int:
    """The smaller of an index and a number."""
    return min(a, b) if isinstance(a, int) else tirx.min(a, b)


def vector_type(dtype: str, lanes: int) -> str:
    """The dtype of a vector."""
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


def cast(value: Expr, dtype: str, lanes: int) -> Expr:
    """Convert every lane."""
    return tirx.Cast(vector_type(dtype, lanes), value)


def narrow(value: Expr, lanes: int, kept: int, start: int = 0) -> Expr:
    """`kept` lanes from lane `start`."""
    if kept == lanes:
        return value
    return tirx.Shuffle([value], [tirx.const(start + i, "int32") for i in range(kept)])


def loop(extent: int, threads: int = 1) -> Any:
    """A loop over `extent`: shared between the threads of TVM's pool where `threads` is above one, else serial.

    Only one parallel loop may be open at a time, and buffers a thread writes are allocated inside it.
    """
    return T.parallel(0, extent) if threads > 1 and extent > 1 else T.serial(0, extent)


def for_vectors(size: int, lanes: int, body: Callable[[Expr | int, int], None], threads: int = 1) -> None:
    """Call `body(offset, lanes)` over `size` elements, the remainder in one narrower vector."""
    whole = size // lanes
    if whole:
        with loop(whole, threads) as i:
            body(i * lanes, lanes)
    if size % lanes:
        body(whole * lanes, size % lanes)


def for_blocks(size: int, lanes: int, body: Callable[[Expr | int, int], None]) -> None:
    """Like `for_vectors`, but the last block overlaps its neighbour instead of being narrower.

    Only for bodies that may compute an element twice.
    """
    if size < lanes:
        body(0, size)
        return
    whole = -(-size // lanes)
    with T.serial(0, whole) as i:
        body(tirx.min(i * lanes, size - lanes) if size % lanes else i * lanes, lanes)


def for_overlapping(size: int, most: int, body: Callable[[Expr | int, int], None]) -> None:
    """Like `for_blocks`, in vectors of a power of two of at most `most` lanes; a few of them are written out.

    Other widths than powers of two are taken apart element by element by LLVM.
    """
    lanes = min(most, 1 << (size.bit_length() - 1))
    if size > MOST_UNROLLED * lanes:
        for_blocks(size, lanes, body)
        return
    for start in range(0, size, lanes):
        body(min(start, size - lanes), lanes)


def rounded_product(a: Expr, b: Expr, lanes: int) -> Expr:
    """Multiply float32 lanes, rounding to float32 before anything is added to it.

    LLVM's back end is allowed to contract a product and a sum into one fused operation; the fence forbids it,
    because the reference rounds twice.
    """
    return tirx.call_llvm_pure_intrin(vector_type("float32", lanes), "llvm.arithmetic.fence", a * b)
