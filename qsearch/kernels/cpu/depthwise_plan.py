"""Every static number of the depthwise kernel that dots four kernel rows: blocks, tiles of rows, quads, scratch memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qsearch.kernels.cpu.buffers import channel_constants
from qsearch.kernels.cpu.byte_vectors import channel_order
from qsearch.kernels.cpu.vectors import SHARED_ELEMENTS
from qsearch.quantize.program import OpKey

__all__ = ["WIDTHS", "QuadsPlan"]

# Channels of a block: bytes of a vector.
WIDTHS = (64, 32, 16)
# Output rows of a tile at most.
MAX_ROWS = 3
# Cost of turning four accumulators into bytes, of interleaving four rows, and of a dot, whose operands are both loaded;
# measured on 3 x 3 and 5 x 5 layers.
EPILOGUE, INTERLEAVE, DOT = 15, 8, 2


@dataclass(frozen=True)
class QuadsPlan:
    """Every static number of one such kernel.

    Attributes:
        key: The operation: shapes ((N, H, W, C), (N, OH, OW, C)).
        threads: Threads to share the work between.
    """

    key: OpKey
    threads: int = 1

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """(first channel, channels) of every block; the last overlaps where channels are no multiple of 16."""
        total, first, found = self.key.shapes[0][3], 0, []
        while first < total:
            width = next((w for w in WIDTHS if first + w <= total), WIDTHS[-1])
            found.append((min(first, total - width), width))
            first += width
        return found

    @cached_property
    def rows(self) -> int:
        """Output rows of a tile: as many as make a row cost least."""
        return min(range(1, min(MAX_ROWS, self.key.shapes[-1][1]) + 1), key=self._row_cost)

    def _row_cost(self, rows: int) -> float:
        """Cost of one output row, averaged over whole and remaining tiles."""
        conv, height = self.key.conv, self.key.shapes[-1][1]
        quads = -(-len(self._used_rows(rows)) // 4)
        dots = DOT * 4 * conv.kernel[1] * sum(len(self._quads_of(r, rows)) for r in range(rows))
        tile = conv.stride[1] * quads * INTERLEAVE + dots + rows * EPILOGUE
        return tile * -(-height // rows) / height

    def _used_rows(self, rows: int) -> list[int]:
        """Input rows, relative to a tile's first tap, that its output rows read."""
        conv = self.key.conv
        return sorted({r * conv.stride[0] + kh * conv.dilation[0] for r in range(rows) for kh in range(conv.kernel[0])})

    def _quads_of(self, r: int, rows: int) -> list[int]:
        """Quads that output row `r` of a tile reads."""
        used, conv = self._used_rows(rows), self.key.conv
        taps = (r * conv.stride[0] + kh * conv.dilation[0] for kh in range(conv.kernel[0]))
        return sorted({used.index(tap) // 4 for tap in taps})

    @cached_property
    def slots(self) -> list[int]:
        """Input row of every place in the quads, relative to a tile's first tap."""
        return self._used_rows(self.rows)

    @cached_property
    def quads(self) -> int:
        """Quads of an input column."""
        return -(-len(self.slots) // 4)

    @cached_property
    def terms(self) -> list[tuple[int, int, int]]:
        """(kernel column, output row, quad) of every dot of an output column, in the order of the weights."""
        rows = range(self.rows)
        return [(kw, r, q) for kw in range(self.key.conv.kernel[1]) for r in rows for q in self._quads_of(r, self.rows)]

    @property
    def input_columns(self) -> int:
        """Input columns that the output reads, padding included."""
        conv = self.key.conv
        return (self.key.shapes[-1][2] - 1) * conv.stride[1] + (conv.kernel[1] - 1) * conv.dilation[1] + 1

    @property
    def weights_at(self) -> int:
        """Where a block's weights start in scratch memory, behind the quads."""
        return self.input_columns * self.quads * 4 * WIDTHS[0]

    @property
    def results_at(self) -> int:
        """Where a tile's results start in scratch memory."""
        return self.weights_at + 4 * len(self.terms) * WIDTHS[0]

    @property
    def shared(self) -> int:
        """Threads that share the work: one where there is little of it."""
        return self.threads if int(np.prod(self.key.shapes[-1])) > SHARED_ELEMENTS else 1

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch memory of one thread."""
        return self.results_at + self.rows * self.key.shapes[-1][2] * WIDTHS[0]

    def pack(self, constants: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        """What every channel has (bias, multiplier), by block in the order of the lanes; then the scalars."""
        names = channel_constants(self.key)
        rows = [np.concatenate([constants[name][self._channels(block)] for block in self.blocks]) for name in names]
        return (*rows, constants["integers"], constants["floats"])

    def _channels(self, block: tuple[int, int]) -> np.ndarray:
        return block[0] + channel_order(block[1]).ravel()

    def pack_weight(self, constants: dict[str, np.ndarray]) -> np.ndarray:
        """int8 (C, kh, kw, 1) -> by block, term, vector, lane: the weights of the four rows of a quad."""
        conv, weight, parts = self.key.conv, constants["weight"], []
        for block in self.blocks:
            chosen = weight[self._channels(block), :, :, 0]
            for kw, r, q in self.terms:
                places = np.zeros((block[1], 4), np.int8)
                for kh in range(conv.kernel[0]):
                    place = self.slots.index(r * conv.stride[0] + kh * conv.dilation[0]) - 4 * q
                    if 0 <= place < 4:
                        places[:, place] = chosen[:, kh, kw]
                parts.append(places.ravel())
        return np.concatenate(parts)
