"""Every static number of a convolution on a GPU, and which tile it uses.

A convolution is a product of matrices: pixels x products of one output, by output channels x the same ("implicit GEMM",
Chetlur et al., cuDNN: Efficient Primitives for Deep Learning, 2014, section 3). The first is never written to memory: a
block gathers tiles of it from the image into shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qsearch.kernels.cuda.tile import Problem, Tile, rank_tiles
from qsearch.quantize.program import OpKey

__all__ = ["LAYER_PRECISIONS", "ConvPlan"]

# What a layer's precision makes of its inputs: their dtype, that of a weight, that of a sum.
_DTYPES = {
    "int8": ("uint8", "int8", "int32"),
    "w4a8": ("uint8", "int8", "int32"),
    "int16": ("int16", "int16", "int32"),
    "fp8": ("float8_e4m3fn", "float8_e4m3fn", "float32"),
    "fp16": ("float16", "float16", "float32"),
    "tf32": ("float32", "float32", "float32"),
    "fp32": ("float32", "float32", "float32"),
}
LAYER_PRECISIONS = tuple(_DTYPES)
# Precisions whose products the matrix units sum.
MATRIX_PRECISIONS = ("int8", "w4a8", "fp8", "fp16", "tf32")
# Where the warp's own instructions multiply e4m3; elsewhere the compiler converts it to float16.
E4M3_ARCHITECTURES = ("sm_89", "sm_120")
# The widest copy from global to shared memory, in bytes; a unit of shared memory's layout.
UNIT = 16
# Channels of a tap are filled up to a multiple of so many where weights have scales in groups: one word holds one group's.
GROUPED_RUN = 4


@dataclass(frozen=True)
class ConvPlan:
    """Every static number of one convolution kernel.

    Attributes:
        key: The operation: shapes ((N, H, W, C), [residual], (N, OH, OW, O)).
        arch: Such as 'sm_90'.
        forced: A tile to use instead of the one with the least predicted time.
    """

    key: OpKey
    arch: str
    forced: Tile | None = None

    @property
    def dtypes(self) -> tuple[str, str, str]:
        """Dtypes of an input, a weight and a sum."""
        return _DTYPES[self.key.precision or ""]

    @property
    def integer(self) -> bool:
        """True if products are summed in int32, False for float32."""
        return self.dtypes[2] == "int32"

    @property
    def scaled(self) -> bool:
        """True if every output channel has a multiplier."""
        return self.integer or self.bias_last

    @property
    def bias_last(self) -> bool:
        """True if the bias has the output's unit, and is added to the product of sum and multiplier."""
        return self.key.precision == "fp8"

    @property
    def matrix(self) -> bool:
        """True if the matrix units do it; those before compute capability 8.0 know no tf32, which is then fp32."""
        return self.key.precision in MATRIX_PRECISIONS and (self.key.precision, self.arch) != ("tf32", "sm_75")

    @property
    def nibbles(self) -> bool:
        """True if weights are stored as 4 bits and unpacked into shared memory."""
        return self.key.precision == "w4a8"

    @property
    def grouped(self) -> bool:
        """True if 4-bit weights have scales or offsets."""
        return bool(self.key.weight_group) or self.key.weight_offset

    @property
    def itemsize(self) -> int:
        """Bytes of an input element, and of an unpacked weight."""
        return 1 if self.key.precision == "fp8" else np.dtype(self.dtypes[0]).itemsize

    @property
    def in_channels(self) -> int:
        """Input channels of one convolution group."""
        return self.key.shapes[0][3] // self.key.conv.groups

    @property
    def out_channels(self) -> int:
        """Output channels of one convolution group."""
        return self.key.shapes[-1][3] // self.key.conv.groups

    @property
    def pixels(self) -> int:
        """Output pixels of all images."""
        return int(np.prod(self.key.shapes[-1][:3]))

    @property
    def taps(self) -> int:
        """Positions of the convolution's kernel."""
        return int(np.prod(self.key.conv.kernel))

    @property
    def run(self) -> int:
        """Products of one tap, those included that only fill it up."""
        return -(-self.in_channels // GROUPED_RUN) * GROUPED_RUN if self.grouped else self.in_channels

    @property
    def products(self) -> int:
        """Products of one output."""
        return self.taps * self.run

    @property
    def copy_bytes(self) -> int:
        """Bytes that one copy brings from the image: 16, 8 or 4; 0 where channels are gathered one by one."""
        if self.run != self.in_channels:
            return 0
        return next((size for size in (16, 8, 4) if self.in_channels * self.itemsize % size == 0), 0)

    @property
    def move_bytes(self) -> int:
        """Bytes that a thread brings into shared memory at a time."""
        return self.copy_bytes or 4

    @cached_property
    def outside(self) -> tuple[bool, bool]:
        """Whether some taps lie above or below the image, and left or right of it."""
        conv, image, out = self.key.conv, self.key.shapes[0][1:3], self.key.shapes[-1][1:3]
        ends = ((out[i] - 1) * conv.stride[i] + (conv.kernel[i] - 1) * conv.dilation[i] - conv.padding[i] for i in range(2))
        rows, columns = (conv.padding[i] > 0 or end >= image[i] for i, end in enumerate(ends))
        return rows, columns

    @cached_property
    def candidates(self) -> list[Tile]:
        """Tiles, the least predicted time first."""
        depth, groups = self.products * self.itemsize, self.key.conv.groups
        # A word of e4m3 and its two of float16, where those are what is multiplied, of one step and of the next.
        words = 5 if self.key.precision == "fp8" and self.arch not in E4M3_ARCHITECTURES else 1
        problem = Problem(self.pixels, self.out_channels, depth, groups, self.move_bytes, words)
        return rank_tiles(problem, self.arch, self.matrix, self.nibbles)

    @cached_property
    def tile(self) -> Tile:
        """The tile of a block."""
        return self.forced or self.candidates[0]

    @property
    def row_tiles(self) -> int:
        """Tiles along the pixels."""
        return -(-self.pixels // self.tile.rows)

    @property
    def column_tiles(self) -> int:
        """Tiles along the output channels of a group."""
        return -(-self.out_channels // self.tile.columns)

    @property
    def packed_columns(self) -> int:
        """Output channels of a group, those included that only fill the last tile up."""
        return self.column_tiles * self.tile.columns

    @property
    def blocks(self) -> int:
        """Blocks of the grid."""
        return self.row_tiles * self.column_tiles * self.key.conv.groups

    @property
    def step_products(self) -> int:
        """Products of an output that one step of the pipeline brings."""
        return self.tile.depth // self.itemsize

    @property
    def steps(self) -> int:
        """Steps of the pipeline."""
        return -(-self.products // self.step_products)

    @property
    def slots(self) -> int:
        """Steps that have their place in shared memory at a time."""
        return min(self.tile.stages, self.steps)

    @property
    def source_words(self) -> int:
        """Words of 4 bytes of a step's pixels."""
        return self.tile.rows * self.tile.depth // 4

    @property
    def weight_words(self) -> int:
        """Words of a step's weights as they are multiplied."""
        return self.tile.columns * self.tile.depth // 4

    @property
    def packed_words(self) -> int:
        """Words of a step's weights as they lie in global memory."""
        return self.weight_words // 2 if self.nibbles else self.weight_words

    @property
    def slot_words(self) -> int:
        """Words that a step takes in shared memory."""
        return self.source_words + self.packed_words

    @property
    def pipeline_words(self) -> int:
        """Words that the steps under way take."""
        return self.slots * self.slot_words

    @cached_property
    def parts(self) -> int:
        """How many times sums go through shared memory, some at a time."""
        return self.tile.parts(4 * self.pipeline_words)

    @property
    def shared_words(self) -> int:
        """Words of shared memory, those of unpacked weights apart."""
        return max(self.pipeline_words, self.tile.staged_bytes(self.parts) // 4)

    @property
    def entries(self) -> int:
        """Scales, or offsets, of one output channel's 4-bit weights."""
        return self.taps * -(-self.in_channels // self.key.weight_group) if self.key.weight_group else 1

    @property
    def tables_at(self) -> tuple[int, int, int]:
        """Where in the packed weight the scales of 4-bit weights begin, the offsets, and where it ends, in bytes."""
        columns = self.key.conv.groups * self.packed_columns
        scales = self.key.conv.groups * self.column_tiles * self.steps * self.packed_words * 4
        offsets = scales + (-(-columns * self.entries // 2) if self.key.weight_group else 0)
        return scales, offsets, offsets + (columns * self.entries if self.key.weight_offset else 0)
