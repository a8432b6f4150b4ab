"""Memory: the bytes a compiled module needs, counted, not sampled."""

from __future__ import annotations

from typing import Any

import numpy as np

from qsearch.build.link import CompiledModule
from qsearch.errors import MeasureError
from qsearch.measure.measurement import Memory

__all__ = ["measure_memory"]


def measure_memory(module: CompiledModule) -> Memory:
    """Count weights, planned activations and kernel workspace.

    Activations are the storages that Relax's static planner allocates (a storage serves several values in
    turn), the output, and the input, which the caller holds. Workspace is the largest scratch buffer of any
    kernel: kernels run one after another and TVM's pool hands the same memory to each.
    """
    activations = _planned_bytes(module.source) + module.program.input.bytes
    return Memory(module.weight_bytes, activations, module.workspace_bytes)


def _planned_bytes(source: Any) -> int:
    import tvm
    from tvm import relax

    passes = [
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
    ]
    planned = tvm.transform.Sequential(passes)(source)
    total = 0
    for block in planned["main"].body.blocks:
        for binding in block.bindings:
            total += _allocated(binding.value)
    if total == 0:
        raise MeasureError("the planned module allocates nothing; its memory cannot be counted with this version of TVM")
    return total


def _allocated(value: Any) -> int:
    """Bytes of an allocation, 0 for any other expression."""
    operator = getattr(getattr(value, "op", None), "name", None)
    if operator == "relax.memory.alloc_storage":
        return int(value.args[0].values[0])
    if operator == "relax.builtin.alloc_tensor":
        shape = [int(extent) for extent in value.args[0].values]
        return int(np.prod(shape)) * np.dtype(str(value.args[1].value)).itemsize
    return 0
