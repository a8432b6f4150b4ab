"""Every static number of a matmul kernel: tiles, the packed panel, places of the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from tvm import tirx
from tvm.ir import Expr

from qsearch.kernels.cpu.isa import Isa
from qsearch.quantize.program import OpKey

__all__ = ["MatmulPlan"]

MAX_TILE_COLUMNS = 4
MAX_TILE_ROWS = 12


@dataclass(frozen=True)
class MatmulPlan:
    """Every static number of one matmul kernel.

    Attributes:
        key: The operation.
        isa: Instruction set.
    """

    key: OpKey
    isa: Isa

    @property
    def integer(self) -> bool:
        """True for uint8 operands, False for float32."""
        return self.key.precision == "int8"

    @property
    def group(self) -> int:
        """Elements of one contraction step."""
        return self.isa.dot_group if self.integer else 1

    @property
    def batch(self) -> int:
        """Number of products."""
        return math.prod(self.key.matmul.extents[:-3])

    @property
    def work(self) -> int:
        """Multiplications altogether."""
        return math.prod(self.key.matmul.extents)

    @property
    def columns(self) -> int:
        """Vectors of columns of b."""
        return -(-self.key.matmul.extents[-2] // self.isa.lanes)

    @property
    def steps(self) -> int:
        """Steps of the contraction, the last perhaps incomplete."""
        return -(-self.key.matmul.extents[-1] // self.group)

    @property
    def vector(self) -> int:
        """Elements of b in one step of one vector of columns."""
        return self.isa.lanes * self.group

    @property
    def panel_elements(self) -> int:
        """Elements of the packed b."""
        return self.columns * self.steps * self.vector

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch memory of one thread."""
        return self.panel_elements * (1 if self.integer else 4) + (self.columns * self.isa.lanes * 4 if self.integer else 0)

    @cached_property
    def column_chunks(self) -> tuple[tuple[int, int, int], ...]:
        """(first, count, width) of the chunks of vectors of columns."""
        return _even_pieces(self.columns, MAX_TILE_COLUMNS)

    @cached_property
    def row_tiles(self) -> dict[int, tuple[tuple[int, int, int], ...]]:
        """Width of a chunk -> (first, count, height) of its tiles of rows."""
        found = {}
        for _, _, width in self.column_chunks:
            # Beside the accumulators, a register per vector of b; and for integers one per row for its sum, and the ones.
            extra = 1 if self.integer else 0
            height = (self.isa.registers - width - 1 - extra) // (width + extra)
            found[width] = _even_pieces(self.key.matmul.extents[-3], max(1, min(height, MAX_TILE_ROWS)))
        return found

    def offset(self, strides: tuple[int, ...], i: Expr) -> Expr:
        """Where the i-th product of the batch starts in an operand."""
        at: Expr = tirx.const(strides[0], "int32")
        rest = i
        for extent, stride in reversed(list(zip(self.key.matmul.extents[:-3], strides[1:-2], strict=True))):
            at, rest = at + tirx.floormod(rest, extent) * stride, tirx.floordiv(rest, extent)
        return at

    def first_column(self, column: Expr) -> Expr | int:
        """The first column of a vector: the last one overlaps its neighbour, a single short one starts at zero."""
        lanes, n = self.isa.lanes, self.key.matmul.extents[-2]
        if n <= lanes:
            return 0
        return tirx.min(column * lanes, n - lanes) if n % lanes else column * lanes


def _even_pieces(total: int, most: int) -> tuple[tuple[int, int, int], ...]:
    """Cut a length into pieces of at most `most`, as even as can be: (first, count, length) of each kind of piece."""
    pieces = -(-total // most)
    length, longer = divmod(total, pieces)
    found = ((0, longer, length + 1), (longer * (length + 1), pieces - longer, length))
    return tuple(piece for piece in found if piece[1])
