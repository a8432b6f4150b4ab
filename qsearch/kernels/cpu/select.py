"""Concatenation over channels and static selections of channels, each input copied or requantized."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cpu.epilogue import Arguments, declare_arguments, finished
from qsearch.kernels.cpu.isa import Isa
from qsearch.kernels.cpu.vectors import SHARED_ELEMENTS, cast, for_overlapping, kernel, load, loop, rounded_product, splat, store
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["Stretch", "concat", "stretches"]

# Shuffles of more groups than this are moved channel by channel.
MOST_STREAMS = 8


@dataclass(frozen=True)
class Stretch:
    """Output channels that one rule describes: `length` rounds, each taking the next channel of every stream.

    One stream is a plain copy of adjacent channels; two are an interleave, the shuffle of two groups.

    Attributes:
        start: First output channel.
        length: Channels taken of each stream.
        streams: (input, first channel) per stream.
    """

    start: int
    length: int
    streams: tuple[tuple[int, int], ...]


def concat(key: OpKey, isa: Isa, threads: int) -> Kernel | None:
    """Describe a concatenation over the last axis, of all channels or selected ones; None for others."""
    if key.kind != "concat":
        return None

    def generate(symbol: str) -> tirx.PrimFunc:
        return kernel(symbol, lambda: _concat(key, isa, threads))

    def pack(constants: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        return constants["zero_points"], constants["multipliers"], constants["integers"], constants["floats"]

    return Kernel(key, (isa.name,), generate, pack)


def stretches(widths: tuple[int, ...], channels: tuple[int, ...] | None) -> list[Stretch]:
    """Split a selection into stretches, the longest first found.

    Args:
        widths: Channels of every input.
        channels: Selected channels of their concatenation; None for all.
    """
    origin = [(i, channel) for i, width in enumerate(widths) for channel in range(width)]
    picks = origin if channels is None else [origin[channel] for channel in channels]
    found, start = [], 0
    while start < len(picks):
        lengths = {count: _rounds(picks, start, count) for count in range(1, MOST_STREAMS + 1)}
        # Several streams that advance together only once are not a pattern.
        count = max((n for n in lengths if n == 1 or lengths[n] > 1), key=lambda n: (n * lengths[n], -n))
        found.append(Stretch(start, lengths[count], tuple(picks[start : start + count])))
        start += count * lengths[count]
    return found


def _rounds(picks: list[tuple[int, int]], start: int, count: int) -> int:
    """How often `count` streams that begin at `start` advance by one channel each."""
    end = start
    while end + count <= len(picks):
        rounds = (end - start) // count
        expected = [(i, channel + rounds) for i, channel in picks[start : start + count]]
        if picks[end : end + count] != expected:
            break
        end += count
    return (end - start) // count


@dataclass(frozen=True)
class _Mover:
    """What moving a stretch needs: the kernel's buffers and scalars."""

    key: OpKey
    isa: Isa
    sources: list[tirx.Buffer]
    zero_points: tirx.Buffer
    multipliers: tirx.Buffer
    arguments: Arguments
    output: tirx.Buffer

    def move(self, pixel: Expr, stretch: Stretch) -> None:
        """Write one stretch of one pixel."""
        target = pixel * self.key.shapes[-1][-1] + stretch.start
        count = len(stretch.streams)
        starts = [(i, pixel * self.key.shapes[i][-1] + channel) for i, channel in stretch.streams]
        if count > 2:
            with T.serial(0, stretch.length) as step:
                for part, (i, start) in enumerate(starts):
                    store(self.output, target + step * count + part, self._part(i, start + step, 1))
            return

        def block(offset: Expr | int, lanes: int) -> None:
            parts = [self._part(i, start + offset, lanes) for i, start in starts]
            if count > 1:
                order = [tirx.const(part * lanes + lane, "int32") for lane in range(lanes) for part in range(count)]
                parts = [tirx.Shuffle(parts, order)]
            store(self.output, target + offset * count, parts[0], lanes * count)

        bytes_only = self.output.dtype == "uint8" and all(self.key.copies[i] for i, _ in starts)
        for_overlapping(stretch.length, 4 * self.isa.lanes // count if bytes_only else self.isa.lanes, block)

    def _part(self, i: int, index: Expr, lanes: int) -> Expr:
        """Channels of input `i` as the output holds them."""
        value = load(self.sources[i], index, lanes)
        if self.key.copies[i]:
            return value
        centred = cast(cast(value, "int32", lanes) - splat(load(self.zero_points, i), lanes), "float32", lanes)
        value = rounded_product(centred, splat(load(self.multipliers, i), lanes), lanes)
        return finished(self.isa, str(self.output.dtype), value, lanes, self.arguments, False)


def _concat(key: OpKey, isa: Isa, threads: int) -> None:
    pixels, inputs = int(np.prod(key.shapes[-1][:-1])), len(key.shapes) - 1
    sources = [T.arg(f"source{i}", T.Buffer((int(np.prod(key.shapes[i])),), key.dtypes[i])) for i in range(inputs)]
    zero_points = T.arg("zero_points", T.Buffer((inputs,), "int32"))
    multipliers = T.arg("multipliers", T.Buffer((inputs,), "float32"))
    arguments = declare_arguments()
    output = T.arg("output", T.Buffer((int(np.prod(key.shapes[-1])),), key.dtypes[-1]))
    mover = _Mover(key, isa, sources, zero_points, multipliers, arguments, output)
    found = stretches(tuple(shape[-1] for shape in key.shapes[:-1]), key.channels)
    with loop(pixels, threads if pixels * key.shapes[-1][-1] > SHARED_ELEMENTS else 1) as pixel:
        for stretch in found:
            mover.move(pixel, stretch)
