"""Kernels for NVIDIA GPUs, written as TIR for single threads and compiled through CUDA C++."""

from __future__ import annotations

from qsearch.errors import BuildError
from qsearch.kernels.cuda.conv_plan import ConvPlan
from qsearch.kernels.cuda.conv_tensor import candidate_tiles, conv2d, conv2d_kernel
from qsearch.kernels.cuda.elementwise import elementwise, lookup, multiply_broadcast
from qsearch.kernels.cuda.tile import Tile
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["RULES", "Tile", "candidate_tiles", "describe_kernel"]

# The first rule that applies wins.
RULES = (conv2d, elementwise, multiply_broadcast, lookup)


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
