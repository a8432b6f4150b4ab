"""Compile one operation's kernel and run it: what the tests of kernels share."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import tvm
from targets import OTHER_CPUS, runnable

from qsearch.build.cache import compile_kernel
from qsearch.build.target import Target, open_target
from qsearch.kernels.description import Kernel
from qsearch.quantize.lower_nodes import scalars
from qsearch.quantize.program import Op, OpKey, Value

# All instruction sets pass the same tests; in the default run, test_isa.py has fewer of them for other CPUs'.
TARGETS = ("host", "portable", *(runnable(name, pytest.mark.slow) for name in OTHER_CPUS))


def run_kernel(op: Op, inputs: list[np.ndarray], target: Target) -> np.ndarray:
    """The operation's output as its kernel computes it."""
    kernel, module = _compiled(op.key, target)
    constants = list(kernel.pack(op.constants))
    if kernel.pack_weight is not None:
        constants.insert(0, kernel.pack_weight(op.constants))
    output = tvm.runtime.tensor(np.zeros(op.output.size, op.output.dtype))
    arguments = [tvm.runtime.tensor(np.ascontiguousarray(a).ravel()) for a in (*inputs, *constants)]
    module["tested"](*arguments, output)
    return output.numpy().reshape(op.output.shape)


@lru_cache(maxsize=2000)
def _compiled(key: OpKey, target: Target) -> tuple[Kernel, Any]:
    """A kernel and its module; the key decides both."""
    kernel = target.describe(key)
    return kernel, compile_kernel(kernel, "tested", target).mod


def make_op(key: OpKey, **constants: np.ndarray) -> Op:
    """An operation with neutral scalars unless given."""
    names = tuple(f"x{i}" for i in range(len(key.shapes) - 1))
    return Op("tested", key, names, Value("y", key.shapes[-1], key.dtypes[-1]), scalars() | constants)


def random_inputs(rng: np.random.Generator, key: OpKey, largest: int = 2**15 - 1) -> list[np.ndarray]:
    """Values of the inputs' dtypes: all of uint8, int16 up to `largest` (the first input only), or normal floats."""
    inputs = []
    for i, (shape, dtype) in enumerate(zip(key.shapes[:-1], key.dtypes[:-1], strict=True)):
        if dtype == "uint8":
            inputs.append(rng.integers(0, 256, shape, dtype=np.uint8))
        elif dtype == "int16":
            limit = 2**15 - 1 if i else largest
            inputs.append(rng.integers(-limit, limit + 1, shape, dtype=np.int16))
        else:
            inputs.append((3 * rng.standard_normal(shape)).astype(np.float32).astype(dtype))
    return inputs


def target_named(name: str) -> Target:
    """A target by name."""
    return open_target(name)
