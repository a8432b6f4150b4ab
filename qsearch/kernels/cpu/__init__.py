"""Kernels for CPUs, written as TIR and compiled by LLVM."""

from __future__ import annotations

from qsearch.errors import BuildError
from qsearch.kernels.cpu.conv2d import conv2d, conv2d_kernel
from qsearch.kernels.cpu.conv_plan import ConvPlan
from qsearch.kernels.cpu.depthwise import depthwise
from qsearch.kernels.cpu.depthwise_quads import depthwise_quads
from qsearch.kernels.cpu.elementwise import elementwise, lookup, multiply_broadcast
from qsearch.kernels.cpu.gather import gather
from qsearch.kernels.cpu.isa import ISAS, Isa
from qsearch.kernels.cpu.layout import to_channels_first, to_channels_last
from qsearch.kernels.cpu.matmul import matmul
from qsearch.kernels.cpu.pixels import argmax, pixels
from qsearch.kernels.cpu.pool import pool2d
from qsearch.kernels.cpu.rows import rows
from qsearch.kernels.cpu.select import concat
from qsearch.kernels.cpu.tile import Tile
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["ISAS", "RULES", "Isa", "Tile", "candidate_tiles", "describe_kernel"]

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
    pixels,
    argmax,
)


def describe_kernel(key: OpKey, isa: Isa, threads: int = 1, tile: Tile | None = None) -> Kernel:
    """The kernel that carries out an operation on an instruction set, shared between threads.

    Args:
        key: The operation.
        isa: Instruction set.
        threads: Threads.
        tile: A register tile to use instead of the predicted one; means something where `candidate_tiles` gives some.

    Raises:
        BuildError: No rule applies.
    """
    if {"float16", "float8_e4m3fn"} & {*key.dtypes}:
        raise BuildError(f"no CPU kernel for {key.kind} with dtypes {key.dtypes}: float16 and float8 are for CUDA targets only")
    for rule in RULES:
        kernel = rule(key, isa, threads)
        if kernel is not None:
            return conv2d_kernel(ConvPlan(key, isa, threads, tile)) if tile and rule is conv2d else kernel
    raise BuildError(f"no CPU kernel for {key.kind} with dtypes {key.dtypes}; this is a gap in qsearch's kernel set")


def candidate_tiles(key: OpKey, isa: Isa, threads: int, count: int) -> list[Tile]:
    """Register tiles worth timing for an operation, the predicted best first; none where there is nothing to choose."""
    rule = next((rule for rule in RULES if rule(key, isa, threads) is not None), None)
    return ConvPlan(key, isa, threads).tiles[:count] if rule is conv2d else []
