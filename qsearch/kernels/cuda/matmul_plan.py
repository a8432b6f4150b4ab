"""Where the products of a batch lie, and what they sum."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script import builder as T

from qsearch.kernels.cuda.epilogue import FLOAT_DTYPES
from qsearch.kernels.cuda.simt import constant
from qsearch.kernels.description import Kernel
from qsearch.kernels.prim_func import Arguments, declare_arguments, kernel
from qsearch.quantize.program import OpKey

__all__ = ["MatmulPlan", "Product", "matmul_kernel"]


class Product(Protocol):
    """What writes the body of a product's kernel."""

    def write(self) -> None:
        """Emit its statements."""
        ...


def matmul_kernel(key: OpKey, product: Callable[[tirx.Buffer, tirx.Buffer, Arguments, tirx.Buffer], Product]) -> Kernel:
    """The kernel of a batch of products.

    Args:
        key: kind 'matmul', shapes (a, b, out), strides in `matmul`.
        product: Operands, scalars and output -> what writes its body.
    """

    def body() -> None:
        sizes = [int(np.prod(shape)) for shape in key.shapes]
        a, b = (T.arg(name, T.Buffer((sizes[i],), key.dtypes[i])) for i, name in enumerate("ab"))
        arguments = declare_arguments()
        product(a, b, arguments, T.arg("output", T.Buffer((sizes[2],), key.dtypes[2]))).write()

    return Kernel(key, (), lambda symbol: kernel(symbol, body), lambda constants: (constants["integers"], constants["floats"]))


@dataclass(frozen=True)
class MatmulPlan:
    """Static numbers of a kernel of products, whatever multiplies.

    Attributes:
        key: The operation.
    """

    key: OpKey

    @property
    def total(self) -> str:
        """Dtype of sums and of tiles."""
        return "float32" if self.key.dtypes[0] in FLOAT_DTYPES else "int32"

    @property
    def extents(self) -> tuple[int, int, int]:
        """(m, n, k)."""
        m, n, k = self.key.matmul.extents[-3:]
        return m, n, k

    @property
    def batch(self) -> int:
        """Number of products."""
        return math.prod(self.key.matmul.extents[:-3])

    def offset(self, strides: tuple[int, ...], product: Expr) -> Expr:
        """Where a product of the batch starts in an operand."""
        at, rest = constant(strides[0], "int32"), product
        for extent, stride in reversed(list(zip(self.key.matmul.extents[:-3], strides[1:-2], strict=True))):
            at, rest = at + rest % extent * stride, rest // extent
        return at
