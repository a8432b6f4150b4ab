"""Tiles of a strided operand in shared memory, the contraction innermost, zero where the operand has no element."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cuda.simt import WIDEST, constant, load, registers, shared, store
from qsearch.kernels.cuda.vectors import element_bytes, fetch, put

__all__ = ["Operand", "fill"]


@dataclass(frozen=True)
class Operand:
    """One operand's tile of a block.

    Attributes:
        source: Its memory.
        start: Index of the product's first element.
        strides: Of the lines, that are rows of a or columns of b, and of the contraction.
        first: First line of the tile.
        extents: Lines, and elements of the contraction.
        size: (lines, elements) of the tile.
        aligned: A number of elements that divides every line's beginning and the contraction.
    """

    source: tirx.Buffer
    start: Expr
    strides: tuple[int, int]
    first: Expr
    extents: tuple[int, int]
    size: tuple[int, int]
    aligned: int

    @property
    def dtype(self) -> str:
        """Dtype of an element."""
        return str(self.source.dtype)

    @property
    def line(self) -> int:
        """Elements from one line of the tile to the next: 16 bytes more than it holds, so that eight lines lie in all banks."""
        return self.size[1] + WIDEST // element_bytes(self.dtype)

    @property
    def lanes(self) -> int:
        """Elements that are adjacent in memory and in the tile, and move together."""
        lanes = WIDEST // element_bytes(self.dtype) if self.strides[1] == 1 else 1
        while self.aligned % lanes:
            lanes //= 2
        return lanes

    def tile(self) -> tirx.Buffer:
        """Memory for the tile."""
        return shared(self.size[0] * self.line, self.dtype)


def fill(operand: Operand, tile: tirx.Buffer, thread: Expr, threads: int, step: Expr) -> None:
    """Fill a tile from element `step` of the contraction on; adjacent threads take what is adjacent in memory."""
    (lines, depth), lanes = operand.size, operand.lanes
    units = depth // lanes
    for i in range(-(-lines * units // threads)):
        unit = thread + i * threads
        if operand.strides[1] == 1 or operand.strides[0] != 1:
            line, place = unit // units, unit % units * lanes
        else:
            line, place = unit % lines, unit // lines
        if (i + 1) * threads > lines * units:
            with T.If(unit < lines * units), T.Then():
                _move(operand, tile, line, place, step + place)
        else:
            _move(operand, tile, line, place, step + place)


def _move(operand: Operand, tile: tirx.Buffer, line: Expr, place: Expr, at: Expr) -> None:
    lanes, (lines, length) = operand.lanes, operand.extents
    index = operand.start + (operand.first + line) * operand.strides[0] + at * operand.strides[1]
    inside = [operand.first + line < lines] if lines % operand.size[0] else []
    inside += [at < length] if length % operand.size[1] else []
    if lanes == 1:
        value = load(operand.source, index)
        value = tirx.if_then_else(tirx.all(*inside), value, constant(0, operand.dtype)) if inside else value
        store(tile, line * operand.line + place, value)
        return
    given = registers(lanes, operand.dtype)
    if inside:
        with T.If(tirx.all(*inside)):
            with T.Then():
                fetch(given, operand.source, index, lanes)
            with T.Else():
                for i in range(lanes):
                    store(given, i, constant(0, operand.dtype))
    else:
        fetch(given, operand.source, index, lanes)
    put(tile, line * operand.line + place, given, lanes)
