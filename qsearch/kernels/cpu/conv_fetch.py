"""What the tiles of a convolution ask the caches for ahead of its use; addresses beyond the end are harmless.

Weights come twice: of the tile itself from the second cache into the first, and of the next chunk of columns from
memory into the second, spread evenly over all tiles of the current chunk, because a core's share of the memory's
bandwidth does not allow it in one go (measured: 15 to 25 % of the layers of 7 x 7 pixels).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cpu.conv_plan import ConvPlan

__all__ = ["fetch_next_rows", "fetch_residual", "fetch_weights"]

# Weights of a tile that stay in the first cache are not asked for; others this many steps ahead.
STREAM_ABOVE_BYTES = 24 * 1024
STEPS_AHEAD = 24
# Inputs and residuals smaller than this are in the second cache already.
FETCH_ABOVE_BYTES = 512 * 1024
LINE_BYTES = 64
# Lines of this many adjacent steps of contraction: an input line lasts as many, whatever the precision.
STEPS_OF_LINE = 16
# Fractions of the next chunk are counted in 1 / 2 ** FRACTION_BITS.
FRACTION_BITS = 12
# Longer contractions, over all the tiles of a column, would overflow them.
MAX_COUNTED_STEPS = 1 << 16
FIRST_CACHE, SECOND_CACHE = 3, 2


def fetch_weights(plan: ConvPlan, weight: tirx.Buffer, chunk: tuple[Expr | int, int], step: Expr | int, tile: Expr | int) -> None:
    """Within one contraction step, fetch weights for later steps of this tile and for the next chunk.

    Args:
        plan: The kernel.
        weight: Packed weights.
        chunk: Index of the first weight, and number of columns.
        step: Number of the contraction step.
        tile: Number of the tile within its block.
    """
    first, columns = chunk
    width = plan.isa.lanes * plan.group
    if plan.nibbles or plan.tile.columns * plan.column_weights * plan.itemsize <= STREAM_ABOVE_BYTES:
        return
    for column in range(columns):
        _prefetch(weight, first + ((step + STEPS_AHEAD) * columns + column) * width, FIRST_CACHE)
    # One line a step at most.
    if plan.block_grid >= plan.tile.columns and plan.step_count <= MAX_COUNTED_STEPS:
        fraction = (columns << FRACTION_BITS) // plan.block_grid
        line = tirx.shift_right((tile * plan.step_count + step) * fraction, tirx.const(FRACTION_BITS, "int32"))
        _prefetch(weight, first + (plan.step_count * columns + line) * width, SECOND_CACHE)


def fetch_next_rows(plan: ConvPlan, image: tirx.Buffer, origin: Expr, step: Expr | int) -> None:
    """Within one contraction step, fetch one line of the input pixels that come after this tile's.

    Only where the input's rows are read once, in order, from beyond the second cache.

    Args:
        plan: The kernel; its pixels are `plan.strides[0]` elements apart.
        image: The input.
        origin: Index of the first element of the next tile.
        step: Number of the contraction step.
    """
    if not plan.flat or int(np.prod(plan.key.shapes[0])) * plan.itemsize <= FETCH_ABOVE_BYTES:
        return
    pixel = tirx.min(tirx.floormod(step, STEPS_OF_LINE), plan.tile.pixels - 1)
    line = tirx.floordiv(step, STEPS_OF_LINE) * (LINE_BYTES // plan.itemsize)
    _prefetch(image, origin + pixel * plan.strides[0] + line, FIRST_CACHE)


def fetch_residual(plan: ConvPlan, residual: tirx.Buffer, places: Sequence[Expr], columns: int) -> None:
    """Fetch the residual of a tile before its contraction begins.

    Args:
        plan: The kernel.
        residual: The other summand.
        places: Index of the first element of every pixel.
        columns: Vectors of output channels.
    """
    itemsize = np.dtype(residual.dtype).itemsize
    if int(np.prod(plan.key.shapes[1])) * itemsize <= FETCH_ABOVE_BYTES:
        return
    for place in places:
        for offset in range(0, columns * plan.isa.lanes, LINE_BYTES // itemsize):
            _prefetch(residual, place + offset, FIRST_CACHE)


def _prefetch(buffer: tirx.Buffer, index: Expr | int, level: int) -> None:
    """Fetch a line for reading into a cache level."""
    address = T.address_of(tirx.BufferLoad(buffer, [index]))
    T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, *(tirx.const(i, "int32") for i in (0, level, 1))))
