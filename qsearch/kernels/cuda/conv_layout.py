"""Where a tile's elements lie in shared memory, and where a thread stands in its block."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cuda.simt import constant, converted, load, registers, store

__all__ = ["UNIT_WORDS", "Place", "divided", "each", "kept", "swizzle", "swizzle_of", "xor"]

# Words of a unit, the 16 bytes that lie together whatever the layout.
UNIT_WORDS = 4


@dataclass(frozen=True)
class Place:
    """Where a thread stands.

    Attributes:
        group: Convolution group.
        row_tile: Tile along the pixels.
        column_tile: Tile along the output channels of the group.
        thread: Number within the block.
    """

    group: Expr | int
    row_tile: Expr
    column_tile: Expr
    thread: Expr

    @property
    def lane(self) -> Expr:
        """Number within the warp."""
        return self.thread % 32

    def warp(self, warps: tuple[int, int, int]) -> tuple[Expr | int, Expr | int, Expr | int]:
        """Which of the warps along rows, columns and depth."""
        number = self.thread // 32
        row, column, depth = number // (warps[1] * warps[2]), number // warps[2] % warps[1], number % warps[2]
        return (row if warps[0] > 1 else 0), (column if warps[1] > 1 else 0), (depth if warps[2] > 1 else 0)


def swizzle(row: int, units: int) -> int:
    """What a row's units are renumbered with, by exclusive or.

    Eight rows that follow one another then have their units of one number in eight different sixteenths of the 32
    banks, whether a row is 2, 4 or 8 units long: reading a matrix of them, or writing rows, meets no bank twice.
    """
    return row // max(1, 8 // units) % min(units, 8)


def swizzle_of(row: Expr, units: int) -> Expr:
    """The same of a row that threads compute."""
    return row // max(1, 8 // units) % min(units, 8)


def xor(a: Expr, b: Expr | int) -> Expr:
    """Exclusive or."""
    return a if isinstance(b, int) and b == 0 else tirx.bitwise_xor(a, b)


def kept(value: Expr) -> Expr:
    """A value computed once and kept in a register."""
    place = registers(1, "int32")
    store(place, 0, value)
    return load(place, 0)


def divided(value: Expr, by: int) -> tuple[Expr, Expr]:
    """Quotient and remainder of an int32 that is not negative: an unsigned division has no signs to mend."""
    if by & (by - 1) == 0:
        return value // by, value % by
    whole, divisor = converted(value, "uint32"), constant(by, "uint32")
    return converted(whole // divisor, "int32"), converted(whole % divisor, "int32")


def each(total: int, threads: int, thread: Expr, body) -> None:  # type: ignore[no-untyped-def]
    """Call body(index, i) for indices 0 .. total - 1 shared between threads: thread t's i-th is t + i * threads."""
    for i in range(-(-total // threads)):
        if (i + 1) * threads > total:
            with T.If(thread + i * threads < total), T.Then():
                body(thread + i * threads, i)
        else:
            body(thread + i * threads, i)
