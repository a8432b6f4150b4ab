"""Where the products of a batch lie, and what they sum."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm.ir import Expr

from qsearch.kernels.cuda.epilogue import FLOAT_DTYPES
from qsearch.kernels.cuda.simt import constant
from qsearch.quantize.program import OpKey

__all__ = ["MatmulPlan"]


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
