"""The reference of operations over float16, from that of float32: float16 is read exactly and rounded once at the end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from qsearch.quantize.program import Op
from qsearch.quantize.reference import run_op

F16, F32 = "float16", "float32"


def wide(dtype: str) -> str:
    return F32 if dtype == F16 else dtype


def expected_output(op: Op, inputs: list[np.ndarray]) -> np.ndarray:
    """What the operation computes; a float16 output saturates."""
    key, constants = op.key, op.constants
    key = replace(key, dtypes=tuple(map(wide, key.dtypes)), precision="fp32" if key.precision == "fp16" else key.precision)
    constants = {name: value.astype(np.float32) if value.dtype == F16 else value for name, value in constants.items()}
    given = [value.astype(np.float32) if value.dtype == F16 else value for value in inputs]
    output = replace(op.output, dtype=wide(op.output.dtype))
    found = run_op(replace(op, key=key, constants=constants, output=output), given)
    return np.clip(found, -65504, 65504).astype(np.float16) if op.output.dtype == F16 else found


def halved(inputs: list[np.ndarray], key: Any) -> list[np.ndarray]:
    """Random inputs in the dtypes of the key."""
    return [value.astype(dtype) if dtype == F16 else value for value, dtype in zip(inputs, key.dtypes, strict=False)]
