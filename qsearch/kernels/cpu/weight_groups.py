"""4-bit weights whose output channels are divided into groups with a scale, and perhaps an offset, of their own.

In the packed weight the 4-bit integers come first, two to a byte, then the scales, two to a byte, then the offsets. They
are unpacked into scratch memory as other 4-bit weights are, and multiplied and shifted there: with u = q + 8 in 0..15
and a scale m in 1..15 no product leaves its byte, so that one multiplication of 16-bit lanes multiplies two weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cpu.vectors import cast, constant, load, registers, store
from qsearch.quantize.program import OpKey

__all__ = ["GroupedChunk", "WeightGroups", "unpack_groups", "weight_groups"]

# Products of one step of a dot, all of one lane.
STEP = 4


@dataclass(frozen=True)
class WeightGroups:
    """Where everything lies; a position is one of the kernel's, a step four of its input channels.

    Attributes:
        positions: Kernel positions.
        channels: Input channels of a convolution group.
        size: Channels of a weight group; 0 where an output channel has one offset for all its weights, and no scales.
        offsets: Groups have offsets.
        lanes: Output channels of a vector.
    """

    positions: int
    channels: int
    size: int
    offsets: bool
    lanes: int

    @property
    def steps(self) -> int:
        """Steps of a position; the last may be incomplete."""
        return -(-self.channels // STEP)

    @property
    def run(self) -> int:
        """Steps of a whole weight group within a position."""
        return self.size // STEP or self.steps

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """(first step, steps) of the runs of a position, each of one weight group: whole ones, then what is left."""
        whole = self.channels // (STEP * self.run)
        starts = [i * self.run for i in range(whole)] + [whole * self.run] * (whole * self.run < self.steps)
        return tuple((start, min(self.run, self.steps - start)) for start in starts)

    @property
    def whole(self) -> int:
        """Runs of complete steps, all of one length."""
        return self.channels // (STEP * self.run)

    @property
    def pairs(self) -> int:
        """Pairs of steps of a position: two steps of one run share the bytes of a packed vector."""
        return sum(-(-steps // 2) for _, steps in self.runs)

    @property
    def entries(self) -> int:
        """Scales, or offsets, of one output channel."""
        return self.positions * -(-self.channels // self.size) if self.size else 1

    @property
    def scale_bytes(self) -> int:
        """Bytes of a vector's scales."""
        return self.entries * self.lanes // 2 if self.size else 0

    @property
    def table_bytes(self) -> int:
        """Bytes of a vector's scales and offsets."""
        return self.scale_bytes + (self.entries * self.lanes if self.offsets else 0)

    def pack(self, vectors: np.ndarray) -> np.ndarray:
        """4-bit integers of one chunk of columns.

        Args:
            vectors: int8 (columns, lanes, positions, channels) in -8..7.

        Returns:
            int8, flat: by position, run, column, pair of steps; then lane and channel of the step. Zero where there is
            no channel.
        """
        columns = len(vectors)
        padded = np.zeros((*vectors.shape[:3], self.steps * STEP), np.uint8)
        padded[..., : self.channels] = vectors + 8
        steps = padded.reshape(columns, self.lanes, self.positions, self.steps, STEP).transpose(2, 0, 3, 1, 4)
        parts = []
        for start, count in self.runs:
            run = steps[:, :, start : start + count]
            low, high = run[:, :, 0::2], np.zeros_like(run[:, :, 0::2])
            high[:, :, : count // 2] = run[:, :, 1::2]
            parts.append((low | high << 4).reshape(self.positions, -1))
        return np.concatenate(parts, 1).view(np.int8).ravel()

    def pack_tables(self, scale: np.ndarray | None, offset: np.ndarray | None) -> np.ndarray:
        """Scales, then what is taken from every product: 8 m - z.

        Args:
            scale: uint8 (columns, lanes, entries), or None for ones.
            offset: int8, likewise, or None for zeros.
        """
        tables = []
        if scale is not None and self.size:
            low, high = np.split(scale.transpose(0, 2, 1), 2, axis=2)
            tables.append((low | high << 4).ravel())
        if offset is not None and self.offsets:
            eights = 8 * (np.ones(1, np.int16) if scale is None else scale.astype(np.int16))
            tables.append((eights - offset).astype(np.uint8).transpose(0, 2, 1).ravel())
        return np.concatenate(tables).view(np.int8)


def weight_groups(key: OpKey, lanes: int) -> WeightGroups | None:
    """The weight groups of a layer; None where an output channel's weights need no scale or offset beside its multiplier."""
    if key.precision != "w4a8" or not (key.weight_group or key.weight_offset):
        return None
    channels = key.shapes[0][3] // key.conv.groups
    return WeightGroups(int(np.prod(key.conv.kernel)), channels, key.weight_group, key.weight_offset, lanes)


@dataclass(frozen=True)
class GroupedChunk:
    """A chunk of columns to unpack.

    Attributes:
        packed: int8, the whole packed weight.
        start: Index of the chunk's first byte in it.
        columns: Number of columns.
        scales: Index of the first byte of the first column's scales.
        offsets: Index of the first of its offsets.
    """

    packed: tirx.Buffer
    start: Expr | int
    columns: int
    scales: Expr | int
    offsets: Expr | int


def unpack_groups(groups: WeightGroups, chunk: GroupedChunk) -> tirx.Buffer:
    """Unpack a chunk into scratch memory, once for all the pixels of a block.

    Returns:
        int8, by position, step, column; then lane and channel of the step.
    """
    return _Unpacker(groups, chunk, _scratch(groups, chunk.columns)).write()


def _scratch(groups: WeightGroups, columns: int) -> tirx.Buffer:
    count = groups.positions * groups.steps * columns * groups.lanes * STEP
    return T.alloc_buffer((count,), "int8", scope="global", layout=None, align=64)


@dataclass(frozen=True)
class _Unpacker:
    """Writes the statements that unpack a chunk."""

    groups: WeightGroups
    chunk: GroupedChunk
    scratch: tirx.Buffer

    def write(self) -> tirx.Buffer:
        groups, columns = self.groups, self.chunk.columns
        pairs = -(-groups.run // 2)
        with T.serial(0, groups.positions) as p:
            at = p * (groups.pairs * columns)
            if groups.whole:
                with T.serial(0, groups.whole) as i:
                    self._run(p, i, at + i * (pairs * columns), groups.run)
            if groups.whole < len(groups.runs):
                self._run(p, groups.whole, at + groups.whole * pairs * columns, groups.runs[-1][1])
        return self.scratch

    def _run(self, p: Expr, run: Expr | int, at: Expr, steps: int) -> None:
        """All columns of one run, from packed vector `at` of the chunk."""
        groups, pairs = self.groups, -(-steps // 2)
        entry = p * (groups.entries // groups.positions) + run if groups.size else 0
        last = groups.channels % STEP if isinstance(run, int) else 0
        for c in range(self.chunk.columns):
            factor, taken = self._tables(c, entry)
            loose = 2 if last and steps % 2 == 0 else steps % 2
            first = p * groups.steps + run * groups.run
            if steps - loose:
                with T.serial(0, (steps - loose) // 2) as j:
                    self._pair(c, first + 2 * j, at + c * pairs + j, [(factor, taken)] * 2)
            if loose:
                parts = [(factor, taken)] * (loose - 1) + [(factor, self._kept(taken, last) if last else taken)]
                self._pair(c, first + steps - loose, at + c * pairs + pairs - 1, parts)

    def _pair(self, c: int, step: Expr, vector: Expr, parts: list[tuple[Expr | None, Expr]]) -> None:
        """Unpack the steps of one packed vector: one or both halves of its bytes."""
        width = self.groups.lanes * STEP
        packed = tirx.reinterpret(f"uint8x{width}", load(self.chunk.packed, self.chunk.start + vector * width, width))
        halves = (packed & constant(15, "uint8", width), packed >> constant(4, "uint8", width))
        for half, (factor, taken) in enumerate(parts):
            value = halves[half]
            if factor is not None:
                value = tirx.reinterpret(f"uint8x{width}", tirx.reinterpret(f"uint16x{width // 2}", value) * factor)
            index = ((step + half) * self.chunk.columns + c) * width
            store(self.scratch, index, tirx.reinterpret(f"int8x{width}", value - taken), width)

    def _tables(self, c: int, entry: Expr | int) -> tuple[Expr | None, Expr]:
        """Factors of 16-bit lanes, None for ones, and what is taken from every product's byte."""
        groups, lanes = self.groups, self.groups.lanes
        factor = taken = None
        if groups.size:
            half = lanes // 2
            index = self.chunk.scales + (c * groups.entries + entry) * half
            both = tirx.reinterpret(f"uint8x{half}", load(self.chunk.packed, index, half))
            parts = [both & constant(15, "uint8", half), both >> constant(4, "uint8", half)]
            scale = cast(tirx.Shuffle(parts, [tirx.const(i, "int32") for i in range(lanes)]), "uint32", lanes)
            words = scale | scale << constant(16, "uint32", lanes)
            factor = _held(tirx.reinterpret(f"uint16x{2 * lanes}", words), f"uint16x{2 * lanes}")
            taken = (words | words << constant(8, "uint32", lanes)) << constant(3, "uint32", lanes)
        if groups.offsets:
            index = self.chunk.offsets + (c * groups.entries + entry) * lanes
            byte = cast(tirx.reinterpret(f"uint8x{lanes}", load(self.chunk.packed, index, lanes)), "uint32", lanes)
            words = byte | byte << constant(16, "uint32", lanes)
            taken = words | words << constant(8, "uint32", lanes)
        return factor, _held(tirx.reinterpret(f"uint8x{STEP * lanes}", taken), f"uint8x{STEP * lanes}")

    def _kept(self, taken: Expr, channels: int) -> Expr:
        """Nothing is taken where a step has no channel, so that the weight there is zero."""
        lanes = self.groups.lanes
        mask = constant((1 << 8 * channels) - 1, "uint32", lanes)
        return tirx.reinterpret(f"uint8x{STEP * lanes}", tirx.reinterpret(f"uint32x{lanes}", taken) & mask)


def _held(value: Expr, dtype: str) -> Expr:
    """A vector computed once."""
    buffer = registers(1, dtype)
    T.buffer_store(buffer, value, [0])
    return tirx.BufferLoad(buffer, [0])
