"""A small kernel compiled for a GPU and, where there is one, run there."""

from __future__ import annotations

import numpy as np
import tvm

from qsearch.build.cache import compile_kernel
from qsearch.build.cuda_toolkit import last_cubin
from qsearch.build.machine import on_device
from qsearch.build.target import open_target
from qsearch.errors import MeasureError
from qsearch.quantize.lower_nodes import scalars
from qsearch.quantize.program import Op, OpKey, Value
from qsearch.quantize.reference import run_op

__all__ = ["check_cubin", "check_run"]

_SHAPE = (1, 4, 4, 16)
# Bytes and float16 in, bytes out.
_DTYPES = ("uint8", "float16", "uint8")


def check_cubin(arch: str) -> str:
    """Compile it.

    Args:
        arch: Such as 'sm_90'.

    Raises:
        QSearchError: It cannot be compiled.
    """
    target = open_target(f"cuda:{arch}")
    compile_kernel(target.describe(_operation().key), "doctor", target)
    return f"{len(last_cubin())} bytes of machine code for {arch}"


def check_run() -> str:
    """Run it on the first GPU, and compare what it gives with the reference.

    Raises:
        QSearchError: It cannot be compiled, or is wrong.
    """
    target, op = open_target("cuda"), _operation()
    kernel = target.describe(op.key)
    module = compile_kernel(kernel, "doctor", target).mod
    rng = np.random.default_rng(0)
    inputs: list[np.ndarray] = [rng.integers(0, 256, _SHAPE).astype(np.uint8), rng.standard_normal(_SHAPE).astype(np.float16)]
    output = on_device(np.full(op.output.size, 0xA5, np.uint8), "cuda")
    given = (*(value.ravel() for value in inputs), *kernel.pack(op.constants))
    module["doctor"](*(on_device(array, "cuda") for array in given), output)
    wrong = int((output.numpy() != run_op(op, inputs).ravel()).sum())
    if wrong:
        raise MeasureError(f"{wrong} of {op.output.size} outputs of a test kernel on {tvm.cuda(0).device_name} are wrong")
    return f"right on {tvm.cuda(0).device_name}, {target.arch}"


def _operation() -> Op:
    constants = scalars(a_zero_point=3, zero_point=128, qmin=0, qmax=255, a_multiplier=0.5, b_multiplier=20.0)
    return Op("doctor", OpKey("add", (_SHAPE,) * 3, _DTYPES), ("a", "b"), Value("y", _SHAPE, "uint8"), constants)
