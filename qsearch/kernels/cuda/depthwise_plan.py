"""Every static number of a depthwise kernel: channels and columns of a thread, which input feeds which output."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tvm.ir import Expr

from qsearch.kernels.cuda.layer import sums_integers
from qsearch.kernels.cuda.vectors import element_bytes
from qsearch.quantize.program import OpKey

__all__ = ["DepthwisePlan"]

MOST_LANES, MOST_COLUMNS = 8, 4
# Bytes of an input vector, beyond which more lanes make no wider load.
MOST_BYTES = 16
# As many threads as keep a large GPU busy: less reuse is better than fewer threads.
ENOUGH_THREADS = 1 << 16
# Accumulators and kernel columns of a thread, whose product is the code of a kernel row; rows are written out up to this.
MOST_WRITTEN_OUT = 320


@dataclass(frozen=True)
class DepthwisePlan:
    """Every static number of one such kernel.

    Attributes:
        key: The operation: shapes ((N, H, W, C), [residual], (N, OH, OW, O)), O a multiple of C.
    """

    key: OpKey

    @property
    def integer(self) -> bool:
        """True if products are summed in int32, False for float32."""
        return sums_integers(self.key)

    @property
    def total(self) -> str:
        """Dtype of an accumulator."""
        return "int32" if self.integer else "float32"

    @property
    def channels(self) -> int:
        """Output channels."""
        return self.key.shapes[-1][3]

    @property
    def multiple(self) -> int:
        """Output channels of an input channel."""
        return self.channels // self.key.shapes[0][3]

    @property
    def _candidates(self) -> list[tuple[int, int]]:
        """(lanes, columns), the most reuse first."""
        most = min(MOST_LANES, MOST_BYTES // element_bytes(self.key.dtypes[0]))
        # All channels of a vector share an input, or every input serves whole runs of it.
        fits = [
            n for n in (8, 4, 2, 1) if n <= most and self.channels % n == 0 and (n % self.multiple == 0 or self.multiple % n == 0)
        ]
        width = self.key.shapes[-1][2]
        columns = sorted({-(-width // -(-width // n)) for n in range(1, MOST_COLUMNS + 1)}, reverse=True)
        return sorted(((lanes, n) for lanes in fits[:2] for n in columns), key=lambda pair: (-pair[0] * pair[1], -pair[0]))

    @cached_property
    def _shape(self) -> tuple[int, int]:
        found = [pair for pair in self._candidates if self._threads(*pair) >= ENOUGH_THREADS]
        # Where even the smallest are too few, vectors are what is kept.
        return found[0] if found else min(self._candidates, key=lambda pair: (pair[1], -pair[0]))

    def _threads(self, lanes: int, columns: int) -> int:
        n, height, width, channels = self.key.shapes[-1]
        return n * height * -(-width // columns) * (channels // lanes)

    @property
    def lanes(self) -> int:
        """Output channels of a thread."""
        return self._shape[0]

    @property
    def columns(self) -> int:
        """Output columns of a thread."""
        return self._shape[1]

    @property
    def input_lanes(self) -> int:
        """Input channels of a thread."""
        return max(1, self.lanes // self.multiple)

    @property
    def groups(self) -> int:
        """Threads that share a position."""
        return self.channels // self.lanes

    @property
    def tiles(self) -> int:
        """Threads that share a row's channel."""
        return -(-self.key.shapes[-1][2] // self.columns)

    @property
    def threads(self) -> int:
        """All threads."""
        return self._threads(self.lanes, self.columns)

    @property
    def written_out(self) -> bool:
        """True where the kernel's rows are no loop."""
        rows, taps = self.key.conv.kernel
        return rows * taps * self.lanes * self.columns <= MOST_WRITTEN_OUT

    @property
    def rows_padded(self) -> bool:
        """True if some output row reads rows that the input does not have."""
        conv, height = self.key.conv, self.key.shapes[0][1]
        last = (self.key.shapes[-1][1] - 1) * conv.stride[0] + (conv.kernel[0] - 1) * conv.dilation[0]
        return conv.padding[0] > 0 or last - conv.padding[0] >= height

    @cached_property
    def reads(self) -> list[tuple[int, list[tuple[int, int]]]]:
        """(input column of a tile, the (output column, kernel column) pairs that read it), in order."""
        conv = self.key.conv
        found: dict[int, list[tuple[int, int]]] = {}
        for j in range(self.columns):
            for kw in range(conv.kernel[1]):
                found.setdefault(j * conv.stride[1] + kw * conv.dilation[1], []).append((j, kw))
        return sorted(found.items())

    def conditions(self, x: Expr, column: int) -> list[Expr]:
        """What must hold for an input column of the tile at output column `x` to exist, where that is not certain."""
        conv, width = self.key.conv, self.key.shapes[0][2]
        left, last = conv.padding[1], (self.tiles - 1) * self.columns * conv.stride[1]
        found = [x * conv.stride[1] >= left - column] if column < left else []
        if last + column - left >= width:
            found.append(x * conv.stride[1] < width + left - column)
        return found
