"""Dense and grouped convolution and linear layers: blocked direct convolution over register tiles.

The loops from the outside in: images, blocks of output rows, groups, parts and chunks of output channels, tiles of
output pixels (`conv_tile`). Threads share one of the outer ones (`ConvPlan.sharing`). Padding is a copy of a
block's rows in scratch memory, filled with the zero point. The last vector of output channels overlaps its
neighbour where the channel count is no multiple of the lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cpu.buffers import LayerBuffers, declare_layer
from qsearch.kernels.cpu.conv_pack import pack_constants, pack_weight
from qsearch.kernels.cpu.conv_plan import LAYER_PRECISIONS, ConvPlan
from qsearch.kernels.cpu.conv_tile import TileSource, TileWriter, unpack_nibbles
from qsearch.kernels.cpu.isa import Isa
from qsearch.kernels.cpu.padding import padded_copy
from qsearch.kernels.cpu.vectors import kernel, loop, smallest
from qsearch.kernels.cpu.weight_groups import GroupedChunk, unpack_groups
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["conv2d", "conv2d_kernel"]


def conv2d(key: OpKey, isa: Isa, threads: int) -> Kernel | None:
    """Describe the kernel of a convolution, or None for another operation.

    Args:
        key: kind 'conv2d'; shapes ((N, H, W, C), [(N, OH, OW, O) residual], (N, OH, OW, O)).
        isa: Instruction set.
        threads: Threads to share the work between.
    """
    if key.kind != "conv2d" or key.precision not in LAYER_PRECISIONS:
        return None
    return conv2d_kernel(ConvPlan(key, isa, threads))


def conv2d_kernel(plan: ConvPlan) -> Kernel:
    """The kernel of a plan."""
    return Kernel(
        plan.key,
        (plan.isa.name, plan.key.precision, plan.tile, plan.block_tiles, plan.sharing),
        lambda symbol: kernel(symbol, lambda: _generate(plan), overlapping=plan.writes_over_residual),
        lambda constants: pack_constants(plan, constants),
        plan.workspace_bytes,
        lambda constants: pack_weight(plan, constants),
        1 if plan.writes_over_residual else None,
    )


def _generate(plan: ConvPlan) -> None:
    channels = plan.packed_columns * plan.isa.lanes
    buffers = declare_layer(plan.key, plan.packed_elements, channels)
    images, height, width, in_channels = plan.key.shapes[0]
    out_size = int(np.prod(plan.key.shapes[-1][1:]))
    if plan.flat or images == 1:
        _one_image(plan, buffers, 0, 0)
        return
    with loop(images, plan.threads if plan.sharing == "images" else 1) as n:
        _one_image(plan, buffers, n * (height * width * in_channels), n * out_size)


def _one_image(plan: ConvPlan, buffers: LayerBuffers, source_base: Expr | int, output_base: Expr | int) -> None:
    """Blocks of rows, one after the other or one thread each."""
    size = plan.block_rows

    def block(index: Expr | int) -> None:
        source, base, first = buffers.source, source_base, 0
        if plan.copies:
            fill = tirx.const(0, plan.key.dtypes[0])
            if plan.integer:
                fill = tirx.Cast(plan.key.dtypes[0], buffers.arguments.integer("a_zero_point"))
            extents, conv = plan.scratch_image(size), plan.key.conv
            first = smallest(index * (plan.block_tiles * plan.tile.rows), plan.grid[0] - size)
            start = (source_base, first * conv.stride[0])
            source, base = padded_copy(source, start, plan.key.shapes[0][1:], conv.padding, extents, fill), 0
        _Walk(plan, buffers, source, base - first * plan.strides[0], output_base, index).all_channels()

    _each(plan.blocks, plan.threads if plan.sharing == "rows" else 1, block)


@dataclass(frozen=True)
class _Walk:
    """The loops over one block of output rows.

    Attributes:
        plan: The kernel.
        buffers: Its arguments.
        source: The input, or its padded copy.
        source_base: Index in it of the first tap of output pixel (0, 0), were it there.
        output_base: Index of the image's first output.
        block: Number of the block.
    """

    plan: ConvPlan
    buffers: LayerBuffers
    source: tirx.Buffer
    source_base: Expr | int
    output_base: Expr | int
    block: Expr | int

    def all_channels(self) -> None:
        """Every group, part and chunk of output channels."""
        plan = self.plan
        shared = {name: plan.threads if plan.sharing == name else 1 for name in ("groups", "columns")}

        def group(g: Expr | int) -> None:
            _each(plan.parts, shared["columns"], lambda part: self.part(g, part))

        _each(plan.key.conv.groups, shared["groups"], group)

    def part(self, g: Expr | int, part: Expr | int) -> None:
        """The columns of one part of group `g`."""
        plan, nr = self.plan, self.plan.tile.columns
        start = (
            plan.first_column(part) if isinstance(part, int) else tirx.min(part * plan.columns, plan.all_columns - plan.columns)
        )
        run = g * plan.parts + part
        packed, vectors = run * plan.columns, run * sum(plan.chunk_vectors)
        whole, rest = divmod(plan.columns, nr)
        _each(whole, 1, lambda i: self.chunk(g, (start + i * nr, packed + i * nr, nr), vectors + i * plan.chunk_vectors[0]))
        if rest:
            done = whole * nr
            self.chunk(g, (start + done, packed + done, rest), vectors + whole * plan.chunk_vectors[0])

    def chunk(self, group: Expr | int, columns: tuple[Expr | int, Expr | int, int], vector: Expr | int) -> None:
        """Every pixel of the block for one chunk of columns.

        Args:
            group: Convolution group.
            columns: First column of the output, first packed column, number of columns.
            vector: First weight vector.
        """
        plan, cols = self.plan, self.plan.grid[1]
        width = plan.isa.lanes * plan.group
        weight, base = self.buffers.weight, vector * width
        if plan.weight_groups is not None:
            groups, scales = plan.weight_groups, plan.tables_at
            offsets = scales + plan.packed_columns * groups.scale_bytes + columns[1] * (groups.entries * groups.lanes)
            packed = GroupedChunk(
                weight, tirx.floordiv(vector, 2) * width, columns[2], scales + columns[1] * groups.scale_bytes, offsets
            )
            weight, base = unpack_groups(groups, packed), 0
        elif plan.nibbles:
            count = plan.chunk_vectors[0 if columns[2] == plan.tile.columns else -1]
            weight, base = unpack_nibbles(weight, vector, count, width), 0
        tile = TileWriter(
            plan, self.buffers, TileSource(self.source, self.source_base, weight, base), group, columns, self.output_base
        )
        self._rows(
            lambda y, row, ty: _split(
                0, cols, plan.tile.cols, lambda x, tx: tile.write((y, x), (ty, tx), row * plan.tiles_across + x // plan.tile.cols)
            )
        )

    def _rows(self, body: Callable[[Expr | int, Expr | int, int], None]) -> None:
        """Call body(output row, number within the block, rows) for every tile along the block's rows."""
        plan, size = self.plan, self.plan.tile.rows
        whole, rest = divmod(plan.grid[0], size)
        start = self.block * plan.block_tiles
        tiles = smallest(whole - start, plan.block_tiles) if whole % plan.block_tiles else plan.block_tiles
        with T.serial(0, tiles) as i:
            body((start + i) * size, i, size)
        if rest and plan.blocks == 1:
            body(whole * size, whole, rest)
        elif rest:
            with T.If(self.block == plan.blocks - 1), T.Then():
                body(whole * size, plan.block_tiles, rest)


def _each(count: int, threads: int, body: Callable[[Expr | int], None]) -> None:
    """Call `body` for every index; a single one makes no loop."""
    if count == 1:
        body(0)
    elif count:
        with loop(count, threads) as i:
            body(i)


def _split(start: Expr | int, total: int, size: int, body: Callable[[Expr | int, int], None]) -> None:
    """Call body(offset, length) over `total` from `start`: whole pieces in a loop, the remainder after it."""
    whole, rest = divmod(total, size)
    if whole == 1:
        body(start, size)
    elif whole:
        with T.serial(0, whole) as i:
            body(start + i * size, size)
    if rest:
        body(start + whole * size, rest)
