"""Kernels for NVIDIA GPUs, written as TIR for single threads and compiled through CUDA C++."""

from __future__ import annotations

from qsearch.errors import BuildError
from qsearch.kernels.cuda.conv_plan import ConvPlan
from qsearch.kernels.cuda.conv_tensor import candidate_tiles, conv2d, conv2d_kernel
from qsearch.kernels.cuda.depthwise import depthwise
from qsearch.kernels.cuda.depthwise_quads import depthwise_quads
from qsearch.kernels.cuda.elementwise import elementwise, lookup, multiply_broadcast
from qsearch.kernels.cuda.gather import gather
from qsearch.kernels.cuda.layout import to_channels_first, to_channels_last
from qsearch.kernels.cuda.matmul import matmul
from qsearch.kernels.cuda.matmul_tensor import matmul_tensor
from qsearch.kernels.cuda.pool import pool2d
from qsearch.kernels.cuda.rows import rows
from qsearch.kernels.cuda.select import concat
from qsearch.kernels.cuda.tile import Tile
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["RULES", "Tile", "candidate_tiles", "describe_kernel"]

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
    matmul_tensor,
    matmul,
    gather,
    rows,
)


def describe_kernel(key: OpKey, arch: str, tile: Tile | None = None) -> Kernel:
    """The kernel that carries out an operation on a GPU.

    Args:
        key: The operation.
        arch: Such as 'sm_90'.
        tile: A tile to use instead of the predicted one; means something where `candidate_tiles` gives some.

    Raises:
        BuildError: No rule applies.
    """
    for rule in RULES:
        kernel = rule(key, arch)
        if kernel is not None:
            return conv2d_kernel(ConvPlan(key, arch, tile)) if tile and rule is conv2d else kernel
    raise BuildError(f"no CUDA kernel for {key.kind} with dtypes {key.dtypes}; this is a gap in qsearch's kernel set")
