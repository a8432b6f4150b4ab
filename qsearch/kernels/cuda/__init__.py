"""Kernels for NVIDIA GPUs, written as TIR for single threads and compiled through CUDA C++."""

from __future__ import annotations

from qsearch.errors import BuildError
from qsearch.kernels.cuda.conv_tensor import conv2d
from qsearch.kernels.cuda.elementwise import elementwise, lookup, multiply_broadcast
from qsearch.kernels.description import Kernel
from qsearch.quantize.program import OpKey

__all__ = ["RULES", "describe_kernel"]

# The first rule that applies wins.
RULES = (conv2d, elementwise, multiply_broadcast, lookup)


def describe_kernel(key: OpKey, arch: str) -> Kernel:
    """The kernel that carries out an operation on a GPU.

    Args:
        key: The operation.
        arch: Such as 'sm_90'.

    Raises:
        BuildError: No rule applies.
    """
    for rule in RULES:
        kernel = rule(key, arch)
        if kernel is not None:
            return kernel
    raise BuildError(f"no CUDA kernel for {key.kind} with dtypes {key.dtypes}; this is a gap in qsearch's kernel set")
