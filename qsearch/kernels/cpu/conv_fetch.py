"""What the tiles of a convolution ask the caches for ahead of its use; addresses beyond the end are harmless.

Weights come twice: of the tile itself from the second cache into the first, and of the next chunk of columns from
memory into the second, spread evenly over all tiles of the current chunk, because a core's share of the memory's
bandwidth does not allow it in one go (measured: 15 to 25 % of the layers of 7 x 7 pixels).
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cpu.conv_plan import ConvPlan

__all__ = ["fetch_next_rows", "fetch_residual", "fetch_weights"]

# A tile's own weights are asked for this many steps ahead.
STEPS_AHEAD = 24
LINE_BYTES = 64
# Lines of this many adjacent steps of contraction: an input line lasts as many, whatever the precision.
STEPS_OF_LINE = 16
# Fractions of the next chunk are counted in 1 / 2 ** FRACTION_BITS.
FRACTION_BITS = 12
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
    if plan.streams_weights:
        for column in range(columns):
            _prefetch(weight, first + ((step + STEPS_AHEAD) * columns + column) * width, FIRST_CACHE)
    if plan.fetches_next_chunk:
        fraction = (columns << FRACTION_BITS) // plan.block_grid
        line = tirx.shift_right((tile * plan.step_count + step) * fraction, tirx.const(FRACTION_BITS, "int32"))
        _prefetch(weight, first + (plan.step_count * columns + line) * width, SECOND_CACHE)


def fetch_next_rows(plan: ConvPlan, image: tirx.Buffer, origin: Expr, step: Expr | int) -> None:
    """Within one contraction step, fetch one line of the input pixels that come after this tile's.

    Args:
        plan: The kernel, flat: its pixels are `plan.strides[0]` elements apart.
        image: The input.
        origin: Index of the first element of the next tile.
        step: Number of the contraction step.
    """
    pixel = tirx.min(tirx.floormod(step, STEPS_OF_LINE), plan.tile.pixels - 1)
    line = tirx.floordiv(step, STEPS_OF_LINE) * (LINE_BYTES // plan.itemsize)
    _prefetch(image, origin + pixel * plan.strides[0] + line, FIRST_CACHE)


def fetch_residual(residual: tirx.Buffer, places: Sequence[Expr], elements: int, itemsize: int) -> None:
    """Fetch the residual of a tile before its contraction begins.

    Args:
        residual: The other summand.
        places: Index of the first element of every pixel.
        elements: Elements of a pixel.
        itemsize: Bytes of an element.
    """
    for place in places:
        for offset in range(0, elements, LINE_BYTES // itemsize):
            _prefetch(residual, place + offset, FIRST_CACHE)


def _prefetch(buffer: tirx.Buffer, index: Expr | int, level: int) -> None:
    """Fetch a line for reading into a cache level."""
    address = T.address_of(tirx.BufferLoad(buffer, [index]))
    T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, *(tirx.const(i, "int32") for i in (0, level, 1))))
