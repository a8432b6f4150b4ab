"""Data movement: runs of adjacent elements copied from wherever they lie."""

from __future__ import annotations

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cpu.epilogue import declare_arguments
from qsearch.kernels.cpu.isa import Isa
from qsearch.kernels.cpu.vectors import SHARED_ELEMENTS, for_vectors, kernel, load, loop, splat, store
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["gather"]


def gather(key: OpKey, isa: Isa, threads: int) -> Kernel | None:
    """Describe a gather; None for another operation.

    Args:
        key: shapes (input, (runs, elements of a run)); `padded` if some runs are zeros.
        isa: Instruction set.
        threads: Threads to share the runs between.
    """
    if key.kind != "gather":
        return None
    shared = threads if int(np.prod(key.shapes[-1])) > SHARED_ELEMENTS else 1

    def pack(constants: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        return constants["index"].astype(np.int32), constants["integers"], constants["floats"]

    return Kernel(key, (isa.name, shared), lambda symbol: kernel(symbol, lambda: _gather(key, isa, shared)), pack)


def _gather(key: OpKey, isa: Isa, threads: int) -> None:
    size, (runs, length), dtype = int(np.prod(key.shapes[0])), key.shapes[-1], key.dtypes[0]
    source = T.arg("source", T.Buffer((size,), dtype))
    index = T.arg("index", T.Buffer((runs,), "int32"))
    arguments = declare_arguments()
    output = T.arg("output", T.Buffer((runs * length,), dtype))
    fill = tirx.const(0.0, "float32") if dtype == "float32" else tirx.Cast(dtype, arguments.integer("a_zero_point"))
    width = isa.lanes * 4 // np.dtype(dtype).itemsize
    with loop(runs, threads) as i:
        first = load(index, i)

        def move(offset: Expr | int, lanes: int) -> None:
            store(output, i * length + offset, load(source, first + offset, lanes), lanes)

        if not key.padded:
            for_vectors(length, width, move)
            return
        with T.If(first >= 0):
            with T.Then():
                for_vectors(length, width, move)
            with T.Else():
                for_vectors(length, width, lambda j, n: store(output, i * length + j, splat(fill, n), n))
