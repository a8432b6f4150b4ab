"""The vocabulary that CUDA kernel generators share: grids, registers, shared memory, vector moves, exact arithmetic.

A kernel is a PrimFunc whose statements one thread executes. Values that lanes compute are scalars: vectors only move, from
memory to registers and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cuda.device import call
from qsearch.kernels.prim_func import kernel

__all__ = [
    "BLOCK",
    "add",
    "at",
    "constant",
    "converted",
    "fma",
    "for_elements",
    "grid",
    "kernel",
    "load",
    "move",
    "mul",
    "registers",
    "round_to_int",
    "shared",
    "store",
    "sync",
    "vector_lanes",
]

# Threads of a block where nothing asks for another number.
BLOCK = 256
# The widest move, in bytes.
WIDEST = 16


@contextmanager
def grid(blocks: int, threads: int) -> Iterator[tuple[Expr, Expr]]:
    """Launch `blocks` blocks of `threads` threads.

    Yields:
        The block's and the thread's number, int32.
    """
    with T.launch_thread("blockIdx.x", blocks) as block, T.launch_thread("threadIdx.x", threads) as thread:
        yield block, thread


def for_elements(size: int, lanes: int, body: Callable[[Expr], None], threads: int = BLOCK) -> None:
    """Call `body(offset)` for every group of `lanes` adjacent elements, one group per thread.

    Args:
        size: Elements; a multiple of lanes.
        lanes: Elements of a thread.
        body: Emits what is done from element `offset` on.
        threads: Threads of a block.
    """
    groups = size // lanes
    threads = min(threads, -(-groups // 32) * 32)
    with grid(-(-groups // threads), threads) as (block, thread):
        index = block * threads + thread
        if groups % threads:
            with T.If(index < groups), T.Then():
                body(index * lanes)
        else:
            body(index * lanes)


def vector_lanes(size: int, *dtypes: str, most: int = WIDEST) -> int:
    """The most adjacent elements, a power of two, that divide `size` and are within `most` bytes in every dtype."""
    lanes = most // max(tirx.const(0, dtype).ty.dtype.bits // 8 for dtype in dtypes)
    while size % lanes:
        lanes //= 2
    return lanes


def constant(value: float, dtype: str) -> Expr:
    """A scalar constant."""
    return tirx.const(value, dtype)


def at(buffer: tirx.Buffer, index: Expr | int) -> Expr:
    """The address of an element, for device functions."""
    return tirx.address_of(tirx.BufferLoad(buffer, [index]))


def load(buffer: tirx.Buffer, index: Expr | int) -> Expr:
    """One element."""
    return tirx.BufferLoad(buffer, [index])


def store(buffer: tirx.Buffer, index: Expr | int, value: Expr) -> None:
    """Write one element."""
    T.buffer_store(buffer, value, [index])


def move(target: tirx.Buffer, to: Expr | int, source: tirx.Buffer, start: Expr | int, lanes: int) -> None:
    """Copy `lanes` adjacent elements in one instruction; both places are multiples of lanes."""
    if lanes == 1:
        store(target, to, load(source, start))
        return
    # TVM loads elements one by one unless it can prove the first one's number a multiple.
    if not isinstance(start, int):
        start = start // lanes * lanes
    T.buffer_store(target, tirx.BufferLoad(source, [tirx.Ramp(start, 1, lanes)]), [tirx.Ramp(to, 1, lanes)])


def registers(count: int, dtype: str) -> tirx.Buffer:
    """Variables of a thread; they stay in registers where every index is a constant after unrolling."""
    return _whole(T.alloc_buffer((count,), dtype, scope="local", layout=None), count)


def shared(count: int, dtype: str) -> tirx.Buffer:
    """Memory that the threads of a block share."""
    return _whole(T.alloc_buffer((count,), dtype, scope="shared", layout=None), count)


def _whole(buffer: tirx.Buffer, count: int) -> tirx.Buffer:
    """Keep TVM from cutting a buffer short.

    It makes buffers end with the last element that it sees an access of, and of an address it sees one element, not those
    behind it that a device function touches. A use of the pointer itself, which leaves no code, counts as one of everything.
    """
    if count > 1:
        T.evaluate(tirx.call_intrin("bool", "tirx.isnullptr", buffer.data))
    return buffer


def sync() -> None:
    """Wait for all threads of the block."""
    T.evaluate(tirx.call_intrin("", "tirx.tvm_storage_sync", "shared"))


def mul(a: Expr, b: Expr) -> Expr:
    """Multiply float32, rounding before anything is added to it: the reference rounds twice."""
    return call("qs_mul", a, b)


def add(a: Expr, b: Expr) -> Expr:
    """Add float32, rounding once."""
    return call("qs_add", a, b)


def fma(a: Expr, b: Expr, c: Expr) -> Expr:
    """Multiply and add, a * b + c, in float32, rounding once; for float sums, which are not exact anyway."""
    return call("qs_fma", a, b, c)


def round_to_int(value: Expr) -> Expr:
    """float32 -> int32, half to even."""
    return call("qs_round", value)


def converted(value: Expr, dtype: str) -> Expr:
    """Convert a scalar."""
    return tirx.Cast(dtype, value)
