"""Concatenation over channels and static selections of channels, each input copied or requantized.

The output's channels are cut into vectors of adjacent ones. A vector takes its channels from one input, adjacent there too, or
in turns from several places, as after a shuffle of groups. Where that leaves few kinds of vectors, a kernel has a branch for
each; a wild selection is looked up channel by channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cuda.epilogue import Arguments, declare_arguments, finished
from qsearch.kernels.cuda.simt import converted, kernel, load, mul, registers, store, vector_lanes
from qsearch.kernels.cuda.vectors import fetched, items, put
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["Run", "concat", "runs_of"]

MOST_LANES = 8
# Branches of a kernel.
MOST_RUNS = 8

Places = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Run:
    """Adjacent vectors of the output that one rule describes.

    Attributes:
        first: First vector.
        count: Vectors.
        streams: (input, first channel) of the places from which channels are taken in turns; every vector takes on where
            the one before left off.
    """

    first: int
    count: int
    streams: Places


def concat(key: OpKey, arch: str) -> Kernel | None:
    """Describe a concatenation over the last axis, of all channels or selected ones; None for others."""
    if key.kind != "concat":
        return None
    places = _places(key)

    def pack(constants: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        table = np.array(places, np.int32).T.ravel()
        return constants["zero_points"], constants["multipliers"], table, constants["integers"], constants["floats"]

    return Kernel(key, (), lambda symbol: kernel(symbol, lambda: _concat(key, places)), pack)


def _places(key: OpKey) -> Places:
    """(input, channel) of every output channel."""
    origin = [(i, channel) for i, shape in enumerate(key.shapes[:-1]) for channel in range(shape[-1])]
    return tuple(origin if key.channels is None else (origin[channel] for channel in key.channels))


def runs_of(places: Places, widths: tuple[int, ...], lanes: int) -> list[Run] | None:
    """Describe a selection in vectors.

    Args:
        places: (input, channel) of every output channel.
        widths: Channels of every input.
        lanes: Channels of a vector, a power of two.

    Returns:
        The runs, or None where some vector follows no rule or lies across the inputs' own vectors.
    """
    if len(places) % lanes:
        return None
    found: list[Run] = []
    for first in range(len(places) // lanes):
        streams = _streams(places[first * lanes : (first + 1) * lanes], widths)
        if streams is None:
            return None
        if found:
            last, step = found[-1], lanes // len(streams)
            follows = tuple((i, channel + last.count * step) for i, channel in last.streams)
            if follows == streams:
                found[-1] = Run(last.first, last.count + 1, last.streams)
                continue
        found.append(Run(first, 1, streams))
    return found


def _streams(places: Places, widths: tuple[int, ...]) -> Places | None:
    """The fewest places that a vector's channels come from in turns."""
    lanes, count = len(places), 1
    while count < lanes or count == 1:
        streams, each = places[:count], lanes // count
        aligned = all(channel % each == 0 and widths[i] % each == 0 for i, channel in streams)
        taken = tuple((i, channel + turn) for turn in range(each) for i, channel in streams)
        if aligned and taken == places:
            return streams
        count *= 2
    return None


@dataclass(frozen=True)
class _Mover:
    """The kernel's arguments."""

    key: OpKey
    sources: list[tirx.Buffer]
    zero_points: tirx.Buffer
    multipliers: tirx.Buffer
    table: tirx.Buffer
    arguments: Arguments
    output: tirx.Buffer

    def by_runs(self, runs: list[Run], lanes: int) -> None:
        """A thread per vector, a branch per run."""
        vectors, pixels = self.key.shapes[-1][-1] // lanes, int(np.prod(self.key.shapes[-1][:-1]))
        with items(pixels * vectors) as item:
            pixel, vector = item // vectors, item % vectors
            for run in runs:
                with T.If(tirx.all(vector >= run.first, vector < run.first + run.count)), T.Then():
                    self._vector(run, pixel, vector - run.first, item * lanes, lanes)

    def _vector(self, run: Run, pixel: Expr, step: Expr, to: Expr, lanes: int) -> None:
        count, each = len(run.streams), lanes // len(run.streams)
        made = registers(lanes, self.key.dtypes[-1])
        for stream, (i, channel) in enumerate(run.streams):
            start = pixel * self.key.shapes[i][-1] + channel + step * each
            given = fetched(self.sources[i], start, each)
            for turn in range(each):
                store(made, turn * count + stream, self._moved(i, load(given, turn)))
        put(self.output, to, made, lanes)

    def by_table(self) -> None:
        """A thread per channel, a branch per input."""
        channels, pixels = self.key.shapes[-1][-1], int(np.prod(self.key.shapes[-1][:-1]))
        with items(pixels * channels) as item:
            pixel, which, channel = (
                item // channels,
                load(self.table, item % channels),
                load(self.table, channels + item % channels),
            )
            for i, source in enumerate(self.sources):
                with T.If(which == i), T.Then():
                    store(self.output, item, self._moved(i, load(source, pixel * self.key.shapes[i][-1] + channel)))

    def _moved(self, i: int, value: Expr) -> Expr:
        """An element of input `i` as the output holds it."""
        if self.key.copies[i]:
            return value
        centred = converted(converted(value, "int32") - load(self.zero_points, i), "float32")
        return finished(self.key.dtypes[-1], mul(centred, load(self.multipliers, i)), self.arguments, False)


def _concat(key: OpKey, places: Places) -> None:
    inputs = len(key.shapes) - 1
    sources = [T.arg(f"source{i}", T.Buffer((int(np.prod(key.shapes[i])),), key.dtypes[i])) for i in range(inputs)]
    zero_points = T.arg("zero_points", T.Buffer((inputs,), "int32"))
    multipliers = T.arg("multipliers", T.Buffer((inputs,), "float32"))
    table = T.arg("table", T.Buffer((2 * len(places),), "int32"))
    arguments = declare_arguments()
    output = T.arg("output", T.Buffer((int(np.prod(key.shapes[-1])),), key.dtypes[-1]))
    mover = _Mover(key, sources, zero_points, multipliers, table, arguments, output)
    lanes = min(vector_lanes(len(places), *key.dtypes), MOST_LANES)
    while lanes >= 1:
        runs = runs_of(places, tuple(shape[-1] for shape in key.shapes[:-1]), lanes)
        if runs is not None and len(runs) <= MOST_RUNS:
            mover.by_runs(runs, lanes)
            return
        lanes //= 2
    mover.by_table()
