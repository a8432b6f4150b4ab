"""The two ends of a module that takes pixels and gives a class: tables per channel, and the largest output."""

from __future__ import annotations

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from qsearch.kernels.cpu.isa import Isa
from qsearch.kernels.cpu.vectors import SHARED_ELEMENTS, cast, kernel, load, loop, registers, store
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["argmax", "pixels"]


def pixels(key: OpKey, isa: Isa, threads: int) -> Kernel | None:
    """Describe q = table[pixel, channel] of (N, H, W, C) pixels; None for another operation."""
    if key.kind != "pixels":
        return None
    size, channels = int(np.prod(key.shapes[0])), key.shapes[0][-1]
    shared = threads if size > SHARED_ELEMENTS else 1

    def body() -> None:
        source = T.arg("source", T.Buffer((size,), "uint8"))
        table = T.arg("table", T.Buffer((256 * channels,), key.dtypes[-1]))
        output = T.arg("output", T.Buffer((size,), key.dtypes[-1]))
        with loop(size // channels, shared) as pixel:
            for channel in range(channels):
                place = pixel * channels + channel
                store(output, place, load(table, cast(load(source, place), "int32", 1) * channels + channel))

    return Kernel(key, (isa.name, shared), lambda symbol: kernel(symbol, body), lambda constants: (constants["table"].ravel(),))


def argmax(key: OpKey, isa: Isa, threads: int) -> Kernel | None:
    """Describe the position of each row's largest number, the first of equal ones; None for another operation."""
    if key.kind != "argmax":
        return None
    count, length = key.shapes[0]

    def body() -> None:
        source = T.arg("source", T.Buffer((count * length,), "float32"))
        output = T.arg("output", T.Buffer((count,), "int32"))
        with loop(count) as row:
            largest, place = registers(1, "float32"), registers(1, "int32")
            store(largest, 0, load(source, row * length))
            store(place, 0, tirx.const(0, "int32"))
            with loop(length) as i:
                value = load(source, row * length + i)
                store(place, 0, tirx.Select(value > load(largest, 0), cast(i, "int32", 1), load(place, 0)))
                store(largest, 0, tirx.max(value, load(largest, 0)))
            store(output, row, load(place, 0))

    return Kernel(key, (isa.name,), lambda symbol: kernel(symbol, body), lambda constants: ())
