"""Every static number of the depthwise kernel that dots four kernel rows: tiles, quads of rows, packed weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tvm.ir import Expr

from qsearch.quantize.program import OpKey

__all__ = ["QuadsPlan"]

MOST_ROWS, MOST_COLUMNS = 2, 4
# As many threads as keep a large GPU busy: less reuse is better than fewer threads.
ENOUGH_THREADS = 1 << 16
# Instructions of turning four rows, and of the end of an output, for a word of four channels.
TURN, END = 8, 32


@dataclass(frozen=True)
class QuadsPlan:
    """Every static number of one such kernel.

    Attributes:
        key: The operation: shapes ((N, H, W, C), [residual], (N, OH, OW, C)).
    """

    key: OpKey

    @property
    def channels(self) -> int:
        """Channels."""
        return self.key.shapes[0][3]

    @cached_property
    def _shape(self) -> tuple[int, int]:
        """(rows, columns) of a tile: the cheapest that leave enough threads, else what leaves most."""
        _, height, width, _ = self.key.shapes[-1]
        rows = sorted({-(-height // -(-height // n)) for n in range(1, MOST_ROWS + 1)})
        columns = sorted({-(-width // -(-width // n)) for n in range(1, MOST_COLUMNS + 1)})
        shapes = [(r, c) for r in rows for c in columns]
        busy = [shape for shape in shapes if self._threads(shape) >= ENOUGH_THREADS]
        return min(busy or shapes[:1], key=self._cost)

    def _threads(self, shape: tuple[int, int]) -> int:
        n, height, width, channels = self.key.shapes[-1]
        return n * -(-height // shape[0]) * -(-width // shape[1]) * (channels // 4)

    def _cost(self, shape: tuple[int, int]) -> float:
        """Instructions for an output word."""
        (rows, columns), conv = shape, self.key.conv
        slots = len(self._slots(rows))
        turned = len({j * conv.stride[1] + kw * conv.dilation[1] for j in range(columns) for kw in range(conv.kernel[1])})
        dots = 4 * columns * conv.kernel[1] * sum(len(self._quads_of(row, rows)) for row in range(rows))
        return (turned * (slots + TURN * -(-slots // 4)) + dots) / (rows * columns) + END

    def _slots(self, rows: int) -> list[int]:
        """Input rows, relative to a tile's first tap, that its output rows read."""
        conv = self.key.conv
        return sorted({r * conv.stride[0] + kh * conv.dilation[0] for r in range(rows) for kh in range(conv.kernel[0])})

    def _quads_of(self, row: int, rows: int) -> list[int]:
        """Quads that an output row of a tile reads."""
        conv, slots = self.key.conv, self._slots(rows)
        return sorted({slots.index(row * conv.stride[0] + kh * conv.dilation[0]) // 4 for kh in range(conv.kernel[0])})

    @property
    def rows(self) -> int:
        """Output rows of a thread."""
        return self._shape[0]

    @property
    def columns(self) -> int:
        """Output columns of a thread."""
        return self._shape[1]

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles along rows and columns of an image."""
        _, height, width, _ = self.key.shapes[-1]
        return -(-height // self.rows), -(-width // self.columns)

    @property
    def threads(self) -> int:
        """All threads."""
        return self._threads(self._shape)

    @cached_property
    def slots(self) -> list[int]:
        """Input row of every place in the quads, relative to a tile's first tap."""
        return self._slots(self.rows)

    @property
    def quads(self) -> int:
        """Quads of an input column."""
        return -(-len(self.slots) // 4)

    def rows_of(self, quad: int) -> list[int]:
        """Output rows of a tile that read a quad."""
        return [row for row in range(self.rows) if quad in self._quads_of(row, self.rows)]

    @cached_property
    def terms(self) -> list[tuple[int, int, int]]:
        """(quad, kernel column, output row) of every dot of an output column, in the order of the weights."""
        columns = range(self.key.conv.kernel[1])
        return [(quad, kw, row) for quad in range(self.quads) for kw in columns for row in self.rows_of(quad)]

    @cached_property
    def reads(self) -> list[tuple[int, list[tuple[int, int]]]]:
        """(input column of a tile, the (output column, kernel column) pairs that read it), in order."""
        conv = self.key.conv
        found: dict[int, list[tuple[int, int]]] = {}
        for j in range(self.columns):
            for kw in range(conv.kernel[1]):
                found.setdefault(j * conv.stride[1] + kw * conv.dilation[1], []).append((j, kw))
        return sorted(found.items())

    def conditions(self, place: Expr, offset: int, axis: int) -> list[Expr]:
        """What must hold for an input row or column to exist, where that is not certain.

        Args:
            place: The row or column.
            offset: Of it from the tile's first tap.
            axis: 0 for a row, 1 for a column.
        """
        before, extent = self.key.conv.padding[axis], self.key.shapes[0][1 + axis]
        last = (self.tiles[axis] - 1) * self._shape[axis] * self.key.conv.stride[axis]
        found = [place >= 0] if offset < before else []
        return [*found, place < extent] if last + offset - before >= extent else found

    def pack_weight(self, constants: dict[str, np.ndarray]) -> np.ndarray:
        """int8 (C, kh, kw, 1) -> int32 by term and channel: the weights of the four rows of a quad."""
        conv, weight = self.key.conv, constants["weight"][..., 0]
        packed = np.zeros((len(self.terms), self.channels, 4), np.int8)
        for i, (quad, kw, row) in enumerate(self.terms):
            for kh in range(conv.kernel[0]):
                place = self.slots.index(row * conv.stride[0] + kh * conv.dilation[0]) - 4 * quad
                if 0 <= place < 4:
                    packed[i, :, place] = weight[:, kh, kw]
        return packed.view(np.int32).ravel()
