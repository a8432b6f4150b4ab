"""Runs of adjacent elements of any width: memory to registers and back in moves of at most 16 bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cuda.simt import WIDEST, grid, move, registers

__all__ = ["element_bytes", "fetch", "fetched", "items", "put"]


def element_bytes(dtype: str) -> int:
    """Size of one element."""
    return int(tirx.const(0, dtype).ty.dtype.bits) // 8


def fetch(target: tirx.Buffer, source: tirx.Buffer, start: Expr | int, lanes: int) -> None:
    """Fill registers with `lanes` adjacent elements; lanes is a power of two and divides `start`."""
    _transfer(target, 0, source, start, lanes)


def fetched(source: tirx.Buffer, start: Expr | int, lanes: int) -> tirx.Buffer:
    """New registers that hold `lanes` adjacent elements; lanes is a power of two and divides `start`."""
    kept = registers(lanes, str(source.dtype))
    fetch(kept, source, start, lanes)
    return kept


def put(target: tirx.Buffer, to: Expr | int, made: tirx.Buffer, lanes: int) -> None:
    """Write registers to `lanes` adjacent elements; lanes is a power of two and divides `to`."""
    _transfer(target, to, made, 0, lanes)


def _transfer(target: tirx.Buffer, to: Expr | int, source: tirx.Buffer, start: Expr | int, lanes: int) -> None:
    piece = min(lanes, WIDEST // element_bytes(str(source.dtype)))
    for i in range(0, lanes, piece):
        move(target, to + i, source, start + i, piece)


@contextmanager
def items(count: int, threads: int = 256) -> Iterator[Expr]:
    """Launch one thread for each of `count` items.

    Args:
        count: Number of items.
        threads: Threads of a block, at most; a multiple of 32.

    Yields:
        The item's number; statements are emitted for items that exist only, so that they may hold no barrier.
    """
    threads = min(threads, -(-count // 32) * 32)
    with grid(-(-count // threads), threads) as (block, thread):
        item = block * threads + thread
        if count % threads:
            with T.If(item < count), T.Then():
                yield item
        else:
            yield item
