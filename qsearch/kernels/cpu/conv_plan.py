"""Every static number of a dense or grouped convolution kernel: contraction, output grid, tile, blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qsearch.kernels.cpu.isa import Isa
from qsearch.kernels.cpu.padding import padded_image
from qsearch.kernels.cpu.tile import Tile, choose_tile
from qsearch.quantize.program import OpKey

__all__ = ["PREFETCH_STEPS", "ConvPlan"]

# An input larger than this is walked in blocks of pixels, all channels for one block, to stay in the cache.
BLOCK_ABOVE_BYTES = 512 * 1024
BLOCK_BYTES = 128 * 1024
# Weights are prefetched this many steps ahead where those of a tile do not stay in the first cache.
PREFETCH_STEPS = 8
PREFETCH_ABOVE_BYTES = 24 * 1024


@dataclass(frozen=True)
class ConvPlan:
    """Every static number of one convolution kernel.

    Attributes:
        key: The operation: shapes ((N, H, W, C), [residual], (N, OH, OW, O)).
        isa: Instruction set.
    """

    key: OpKey
    isa: Isa

    @property
    def integer(self) -> bool:
        """True for uint8 x int8 -> int32, False for float32."""
        return self.key.precision == "int8"

    @property
    def group(self) -> int:
        """Elements of one contraction step."""
        return self.isa.dot_group if self.integer else 1

    @property
    def in_channels(self) -> int:
        """Input channels of one convolution group."""
        return self.key.shapes[0][3] // self.key.conv.groups

    @property
    def out_channels(self) -> int:
        """Output channels of one convolution group."""
        return self.key.shapes[-1][3] // self.key.conv.groups

    @cached_property
    def segments(self) -> tuple[int, int, int]:
        """(count, elements, distance) of the runs of adjacent input elements within a kernel row."""
        conv, channels = self.key.conv, self.key.shapes[0][3]
        if conv.groups == 1 and conv.dilation[1] == 1:
            return 1, conv.kernel[1] * channels, 0
        return conv.kernel[1], self.in_channels, conv.dilation[1] * channels

    @property
    def steps(self) -> tuple[int, int, int]:
        """(kernel rows, segments, groups of a segment): the contraction."""
        count, elements, _ = self.segments
        return self.key.conv.kernel[0], count, -(-elements // self.group)

    @property
    def columns(self) -> int:
        """Vectors of output channels per convolution group."""
        return -(-self.out_channels // self.isa.lanes)

    @property
    def column_weights(self) -> int:
        """Weight elements of one column over the whole contraction."""
        return int(np.prod(self.steps)) * self.isa.lanes * self.group

    @property
    def copies(self) -> bool:
        """True if the image is copied: for padding, or because groups read beyond a segment."""
        return any(self.key.conv.padding) or self.segments[1] % self.group != 0

    @property
    def flat(self) -> bool:
        """True if output pixels map one to one onto input pixels, over the whole batch."""
        conv = self.key.conv
        return not self.copies and conv.kernel == (1, 1) and conv.stride == (1, 1)

    @cached_property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of the output pixels of one image, or (all pixels, 1) where flat."""
        n, height, width, _ = self.key.shapes[-1]
        return (n * height * width, 1) if self.flat else (height, width)

    @cached_property
    def strides(self) -> tuple[int, int]:
        """Input elements between adjacent output rows and output columns."""
        _, _, width, channels = self.key.shapes[0]
        if self.flat:
            return channels, 0
        return self.key.conv.stride[0] * self.row, self.key.conv.stride[1] * channels

    @cached_property
    def row(self) -> int:
        """Input elements of one image row, padded where copied."""
        _, height, width, channels = self.key.shapes[0]
        if not self.copies:
            return width * channels
        return padded_image((height, width, channels), self.key.conv.padding, self.key.dtypes[0]).row

    @cached_property
    def tile(self) -> Tile:
        """The register tile."""
        itemsize = 1 if self.integer else 4
        return choose_tile(self.grid, self.columns, self.column_weights * itemsize, self.isa)

    @cached_property
    def block_rows(self) -> int:
        """Output rows walked for all channels before the next rows."""
        rows, cols = self.grid
        row_bytes = max(1, abs(self.strides[0])) * (4 if self.key.dtypes[0] == "float32" else 1)
        if rows * row_bytes <= BLOCK_ABOVE_BYTES:
            return rows
        return min(rows, max(1, BLOCK_BYTES // row_bytes // self.tile.rows) * self.tile.rows)

    @property
    def packs_bytes(self) -> bool:
        """True if four vectors of results are narrowed to bytes together."""
        return self.isa.lanes == 16 and self.key.dtypes[-1] == "uint8" and self.out_channels >= 16

    @property
    def prefetches(self) -> bool:
        """True if a tile's weights stream from beyond the first cache and are worth fetching ahead."""
        return self.tile.columns * self.column_weights * (1 if self.integer else 4) > PREFETCH_ABOVE_BYTES
