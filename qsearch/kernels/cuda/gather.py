"""Data movement: runs of adjacent elements copied from wherever they lie."""

from __future__ import annotations

import numpy as np
from tvm.tirx.script import builder as T

from qsearch.kernels.cuda.epilogue import declare_arguments
from qsearch.kernels.cuda.simt import constant, converted, kernel, load, registers, store, vector_lanes
from qsearch.kernels.cuda.vectors import fetch, items, put
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import INTEGER_DTYPES, OpKey

__all__ = ["gather"]


def gather(key: OpKey, arch: str) -> Kernel | None:
    """Describe a gather; None for another operation.

    Args:
        key: shapes (input, (runs, elements of a run)); `padded` if some runs are zeros.
        arch: Architecture.
    """
    if key.kind != "gather":
        return None

    def pack(constants: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        return constants["index"].astype(np.int32), constants["integers"], constants["floats"]

    return Kernel(key, (), lambda symbol: kernel(symbol, lambda: _gather(key)), pack)


def _gather(key: OpKey) -> None:
    """One thread per vector of a run; a run may start anywhere, and where that is within a vector it is read in elements."""
    size, (runs, length), dtype = int(np.prod(key.shapes[0])), key.shapes[-1], key.dtypes[0]
    source = T.arg("source", T.Buffer((size,), dtype))
    index = T.arg("index", T.Buffer((runs,), "int32"))
    arguments = declare_arguments()
    output = T.arg("output", T.Buffer((runs * length,), dtype))
    lanes = vector_lanes(length, dtype)
    fill = converted(arguments.integer("a_zero_point") if dtype in INTEGER_DTYPES else constant(0.0, "float32"), dtype)
    with items(runs * length // lanes) as item:
        run, offset = item // (length // lanes), item % (length // lanes) * lanes
        first, given = load(index, run), registers(lanes, dtype)

        def read() -> None:
            if lanes == 1:
                fetch(given, source, first + offset, 1)
                return
            with T.If(first % lanes == 0):
                with T.Then():
                    # The compiler cannot see that this is a multiple of lanes; it is `first + offset`.
                    fetch(given, source, (first // lanes + item % (length // lanes)) * lanes, lanes)
                with T.Else():
                    for i in range(lanes):
                        store(given, i, load(source, first + offset + i))

        if key.padded:
            with T.If(first >= 0):
                with T.Then():
                    read()
                with T.Else():
                    for i in range(lanes):
                        store(given, i, fill)
        else:
            read()
        put(output, item * lanes, given, lanes)
