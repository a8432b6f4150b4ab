"""Every static number of a dense or grouped convolution kernel: contraction, output grid, tile, blocks, sharing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qsearch.kernels.cpu.isa import Isa
from qsearch.kernels.cpu.padding import PaddedImage, padded_image
from qsearch.kernels.cpu.tile import Tile, rank_tiles
from qsearch.kernels.cpu.weight_groups import WeightGroups, weight_groups
from qsearch.qtype import PRECISIONS
from qsearch.quantize.program import OpKey

__all__ = ["LAYER_PRECISIONS", "ConvPlan"]

LAYER_PRECISIONS = ("fp32", "int8", "int16", "w4a8")
# Images larger than this may be walked in blocks of pixels, all channels for one block, to stay in the second cache.
BLOCK_ABOVE_BYTES = 512 * 1024
BLOCK_BYTES = 256 * 1024
SECOND_CACHE_BYTES = 1280 * 1024
# A layer of fewer multiplications is not worth waking another thread for.
SHARED_ABOVE = 1_000_000
# Threads share rows of pixels if each gets at least so many tiles of them, else channels.
TILES_FOR_EACH = 4


@dataclass(frozen=True)
class ConvPlan:
    """Every static number of one convolution kernel.

    Attributes:
        key: The operation: shapes ((N, H, W, C), [residual], (N, OH, OW, O)).
        isa: Instruction set.
        threads: Threads to share the work between.
        forced: A tile to use instead of the one with the least predicted time.
    """

    key: OpKey
    isa: Isa
    threads: int = 1
    forced: Tile | None = None

    @property
    def integer(self) -> bool:
        """True if products are summed in int32, False for float32."""
        return self.key.precision != "fp32"

    @property
    def nibbles(self) -> bool:
        """True if weights are stored as 4 bits and unpacked into scratch memory."""
        return self.key.precision == "w4a8"

    @cached_property
    def weight_groups(self) -> WeightGroups | None:
        """The groups of 4-bit weights that have scales or offsets."""
        return weight_groups(self.key, self.isa.lanes)

    @property
    def group(self) -> int:
        """Elements of one contraction step."""
        return {"fp32": 1, "int16": 2}.get(self.key.precision or "", self.isa.dot_group)

    @property
    def itemsize(self) -> int:
        """Bytes of an input element, and of an unpacked weight."""
        return np.dtype(self.key.dtypes[0]).itemsize

    @property
    def weight_dtype(self) -> str:
        """Dtype of an unpacked weight."""
        return PRECISIONS[self.key.precision or "fp32"].weight.dtype

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
        # Steps of weight groups do not reach from one kernel position into the next.
        apart = self.weight_groups is not None and channels % self.group != 0
        if conv.groups == 1 and conv.dilation[1] == 1 and not apart:
            return 1, conv.kernel[1] * channels, 0
        return conv.kernel[1], self.in_channels, conv.dilation[1] * channels

    @cached_property
    def steps(self) -> tuple[int, int, int]:
        """(kernel rows, segments, groups of a segment): the contraction."""
        count, elements, _ = self.segments
        return self.key.conv.kernel[0], count, -(-elements // self.group)

    @property
    def step_count(self) -> int:
        """Steps of the whole contraction."""
        return int(np.prod(self.steps))

    @property
    def column_weights(self) -> int:
        """Weight elements of one column over the whole contraction."""
        return self.step_count * self.isa.lanes * self.group

    @cached_property
    def sharing(self) -> str:
        """What the threads share: 'images', 'rows', 'groups' or 'columns'; '' where one thread does everything."""
        multiplications = int(np.prod(self.key.shapes[-1])) * int(np.prod(self.key.conv.kernel)) * self.in_channels
        if self.threads == 1 or multiplications < SHARED_ABOVE:
            return ""
        if not self.flat and self.key.shapes[0][0] >= self.threads:
            return "images"
        rows, cols = self.grid
        if rows * cols >= TILES_FOR_EACH * self.threads * 7 and rows >= 2 * self.threads:
            return "rows"
        if self.key.conv.groups >= self.threads:
            return "groups"
        return "columns" if self.all_columns >= self.threads else ""

    @property
    def all_columns(self) -> int:
        """Vectors that hold the output channels of a group."""
        return -(-self.out_channels // self.isa.lanes)

    @property
    def parts(self) -> int:
        """Runs of columns that are packed and computed apart, one for each thread that shares columns."""
        return self.threads if self.sharing == "columns" else 1

    @property
    def columns(self) -> int:
        """Vectors of output channels of one part."""
        return -(-self.all_columns // self.parts)

    def first_column(self, part: int) -> int:
        """First vector of output channels of a part; where they do not divide evenly, the last part overlaps."""
        return min(part * self.columns, self.all_columns - self.columns)

    @property
    def packed_columns(self) -> int:
        """Columns in the packed weight, over all groups and parts."""
        return self.key.conv.groups * self.parts * self.columns

    @property
    def chunk_vectors(self) -> list[int]:
        """Weight vectors of every chunk of columns of a part, rounded up to pairs where they are nibbles."""
        steps, found = self.step_count, []
        if self.weight_groups is not None:
            steps = 2 * self.weight_groups.positions * self.weight_groups.pairs
        for first in range(0, self.columns, self.tile.columns):
            vectors = steps * min(self.tile.columns, self.columns - first)
            found.append(vectors + vectors % 2 if self.nibbles else vectors)
        return found

    @property
    def tables_at(self) -> int:
        """Where the scales of weight groups start in the packed weight; their offsets follow."""
        vector = self.isa.lanes * self.group
        total = self.key.conv.groups * self.parts * sum(self.chunk_vectors) * vector
        return total // 2 if self.nibbles else total

    @property
    def packed_elements(self) -> int:
        """Elements of the packed weight."""
        tables = self.weight_groups.table_bytes if self.weight_groups is not None else 0
        return self.tables_at + self.packed_columns * tables

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
        channels = self.key.shapes[0][3]
        if self.flat:
            return channels, 0
        return self.key.conv.stride[0] * self.row, self.key.conv.stride[1] * channels

    @property
    def row(self) -> int:
        """Input elements of one image row, padded where copied."""
        return self.scratch_image(1).row if self.copies else self.key.shapes[0][2] * self.key.shapes[0][3]

    def scratch_image(self, rows: int) -> PaddedImage:
        """The padded copy that `rows` output rows need."""
        conv = self.key.conv
        needed = (rows - 1) * conv.stride[0] + (conv.kernel[0] - 1) * conv.dilation[0] + 1
        return padded_image(needed, self.key.shapes[0][1:], conv.padding, self.key.dtypes[0])

    @property
    def tiles(self) -> list[Tile]:
        """Tiles that fit, the one with the least predicted time first."""
        grid = self.grid
        if self.sharing == "rows":
            grid = (-(-grid[0] // self.threads), grid[1])
        return rank_tiles(grid, self.columns, self.column_weights * self.itemsize, self.isa)

    @cached_property
    def tile(self) -> Tile:
        """The register tile."""
        return self.forced or self.tiles[0]

    @cached_property
    def block_tiles(self) -> int:
        """Whole tiles along the output rows that are walked for all channels before the next ones."""
        blocks = self._useful_blocks()
        if self.sharing == "rows":
            blocks = -(-blocks // self.threads) * self.threads
        return max(1, -(-(self.grid[0] // self.tile.rows) // blocks))

    def _useful_blocks(self) -> int:
        """Blocks of rows that move the fewest bytes between the second cache and memory."""
        key, pixels = self.key, int(np.prod(self.grid))
        chunks = -(-self.columns // self.tile.columns)
        chunk = self.tile.columns * self.column_weights * self.itemsize
        weights = self.columns * self.column_weights * self.itemsize
        taps = int(np.prod(key.conv.kernel)) * key.shapes[0][3]
        inputs = min(self.grid[0] * abs(self.strides[0]), pixels * taps) * self.itemsize
        outputs = pixels * key.shapes[-1][3] * np.dtype(key.dtypes[-1]).itemsize
        if inputs + outputs <= BLOCK_ABOVE_BYTES:
            return 1
        blocks = -(-(inputs + outputs) // BLOCK_BYTES)
        if weights + BLOCK_BYTES <= SECOND_CACHE_BYTES:
            return blocks
        # Between two uses of an input by adjacent chunks pass the input, this and the next chunk, and their results.
        passing = inputs + 2 * chunk + outputs * len(key.shapes[1:]) // chunks
        if passing <= SECOND_CACHE_BYTES or inputs * chunks + weights <= inputs + weights * blocks:
            return 1
        return blocks

    @property
    def blocks(self) -> int:
        """Runs of `block_tiles` tiles along the output rows; the last may be shorter, and has the remainder of rows."""
        return max(1, -(-(self.grid[0] // self.tile.rows) // self.block_tiles))

    @property
    def block_rows(self) -> int:
        """Most output rows of a block."""
        whole, rest = divmod(self.grid[0], self.tile.rows)
        return min(self.grid[0], self.block_tiles * self.tile.rows + (0 if whole % self.block_tiles else rest))

    @property
    def tiles_across(self) -> int:
        """Tiles along the output columns."""
        return -(-self.grid[1] // self.tile.cols)

    @property
    def block_grid(self) -> int:
        """Tiles of a block."""
        return self.block_tiles * self.tiles_across

    @property
    def workspace_bytes(self) -> int:
        """Scratch memory of all threads."""
        total = 0
        if self.copies:
            total += self.scratch_image(self.block_rows).bytes * (self.threads if self.sharing in ("images", "rows") else 1)
        if self.nibbles:
            vectors = max(self.chunk_vectors) if self.weight_groups is None else self.step_count * self.tile.columns
            total += vectors * self.isa.lanes * self.group * (self.threads if self.sharing else 1)
        return total

    @property
    def packs_bytes(self) -> bool:
        """True if four vectors of results are narrowed to bytes together."""
        return self.isa.narrows_four and self.key.dtypes[-1] == "uint8" and self.out_channels >= self.isa.lanes

    @property
    def writes_over_residual(self) -> bool:
        """True if the output may take the residual's memory: same elements, and none computed twice."""
        key, lanes = self.key, self.isa.lanes
        whole = self.out_channels % lanes == 0 or self.out_channels < lanes
        return key.residual and key.dtypes[1] == key.dtypes[-1] and whole and self.all_columns % self.parts == 0
