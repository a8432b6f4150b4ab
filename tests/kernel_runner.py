"""Compile one operation's kernel and run it: what the tests of kernels share."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import tvm

from qsearch.build.target import Target, open_target
from qsearch.kernels.cpu import describe_kernel
from qsearch.kernels.description import Kernel
from qsearch.quantize.lower_nodes import scalars
from qsearch.quantize.program import Op, OpKey, Value

TARGETS = ("host", "portable")


def run_kernel(op: Op, inputs: list[np.ndarray], target: Target) -> np.ndarray:
    """The operation's output as its kernel computes it."""
    kernel, module = _compiled(op.key, target)
    constants = list(kernel.pack(op.constants))
    if kernel.pack_weight is not None:
        constants.insert(0, kernel.pack_weight(op.constants["weight"]))
    output = tvm.runtime.tensor(np.zeros(op.output.size, op.output.dtype))
    arguments = [tvm.runtime.tensor(np.ascontiguousarray(a).ravel()) for a in (*inputs, *constants)]
    module["tested"](*arguments, output)
    return output.numpy().reshape(op.output.shape)


@lru_cache(maxsize=2000)
def _compiled(key: OpKey, target: Target) -> tuple[Kernel, Any]:
    """A kernel and its module; the key decides both."""
    kernel = describe_kernel(key, target.isa, target.threads)
    return kernel, tvm.compile(tvm.IRModule({"tested": kernel.generate("tested")}), target=target.tvm()).mod


def make_op(key: OpKey, **constants: np.ndarray) -> Op:
    """An operation with neutral scalars unless given."""
    names = tuple(f"x{i}" for i in range(len(key.shapes) - 1))
    return Op("tested", key, names, Value("y", key.shapes[-1], key.dtypes[-1]), scalars() | constants)


def random_inputs(rng: np.random.Generator, key: OpKey) -> list[np.ndarray]:
    """Values of the inputs' dtypes: all of uint8, or normal floats."""
    return [
        rng.integers(0, 256, shape, dtype=np.uint8) if dtype == "uint8" else (3 * rng.standard_normal(shape)).astype(np.float32)
        for shape, dtype in zip(key.shapes[:-1], key.dtypes[:-1], strict=True)
    ]


def target_named(name: str) -> Target:
    """A target by name."""
    return open_target(name)
