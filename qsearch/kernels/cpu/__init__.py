"""Kernels for CPUs, written as TIR and compiled by LLVM."""

from __future__ import annotations

from qsearch.errors import BuildError
from qsearch.kernels.cpu.conv2d import conv2d
from qsearch.kernels.cpu.depthwise import depthwise
from qsearch.kernels.cpu.depthwise_quads import depthwise_quads
from qsearch.kernels.cpu.elementwise import elementwise, lookup, multiply_broadcast
from qsearch.kernels.cpu.gather import gather
from qsearch.kernels.cpu.isa import ISAS, Isa
from qsearch.kernels.cpu.layout import to_channels_first, to_channels_last
from qsearch.kernels.cpu.matmul import matmul
from qsearch.kernels.cpu.pool import pool2d
from qsearch.kernels.cpu.rows import rows
from qsearch.kernels.cpu.select import concat
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["ISAS", "RULES", "Isa", "describe_kernel"]

# The first rule that applies wins.
RULES = (
    depthwise_quads,
    depthwise,
    conv2d,
    elementwise,
    multiply_broadcast,
    lookup,
    pool2d,
    concat,
    to_channels_last,
    to_channels_first,
    matmul,
    gather,
    rows,
)


def describe_kernel(key: OpKey, isa: Isa, threads: int = 1) -> Kernel:
    """The kernel that carries out an operation on an instruction set, shared between threads.

    Raises:
        BuildError: No rule applies.
    """
    for rule in RULES:
        kernel = rule(key, isa, threads)
        if kernel is not None:
            return kernel
    raise BuildError(f"no CPU kernel for {key.kind} with dtypes {key.dtypes}; this is a gap in qsearch's kernel set")
