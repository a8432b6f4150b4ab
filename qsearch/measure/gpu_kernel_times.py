"""Times of single kernels on a GPU, by the GPU's own clock.

A captured graph runs kernels back to back without the host, and no instrument fits between them. So every kernel is launched
alone, many times in a row, on memory of its own. A launch takes one to two microseconds, which the shortest kernels do not
exceed: sums of these times are told on the clock of whole networks by one factor, see `CostModel.scale`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qsearch.build.link import Linker
from qsearch.build.machine import on_device
from qsearch.build.relax_module import Call
from qsearch.quantize.program import Program

__all__ = ["kernel_arguments", "time_gpu_kernels"]

REPEATS, NUMBER = 15, 20
# Of one repeat: the clock resolves half a microsecond.
LEAST_MS = 1.0


def time_gpu_kernels(linker: Linker, programs: Sequence[Program]) -> dict[str, float]:
    """Time every kernel of some programs.

    Args:
        linker: Of a CUDA target, on a machine with such a GPU.
        programs: What the kernels are of.

    Returns:
        Symbol -> seconds per call, the median over repeats.
    """
    import tvm

    calls = {call.symbol: call for program in programs for _, call in linker.calls(program.ops)}
    compiled = linker.cache.get((symbol, call.kernel) for symbol, call in calls.items())
    found = {}
    for symbol, call in calls.items():
        timed = compiled[symbol].library.time_evaluator(
            symbol, tvm.cuda(0), number=NUMBER, repeat=REPEATS, min_repeat_ms=LEAST_MS
        )
        found[symbol] = float(np.median(timed(*kernel_arguments(call)).results))
    return found


def kernel_arguments(call: Call) -> list[Any]:
    """Arguments for a kernel on the GPU: inputs of small positive values, its constants, room for its output."""
    dtypes = call.kernel.key.dtypes
    given = []
    for i, argument in enumerate(call.arguments):
        if isinstance(argument, str):
            # Between the steps of a foreign operation values are of its output's dtype.
            given.append(np.ones(call.shapes[i], dtypes[i] if i < len(dtypes) - 1 else call.dtype))
        else:
            given.append(argument.array)
    return [on_device(array, "cuda") for array in (*given, np.zeros(call.shape, call.dtype))]
