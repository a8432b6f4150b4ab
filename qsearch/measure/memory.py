"""Memory: the bytes a compiled module needs, counted, not sampled."""

from __future__ import annotations

from qsearch.build.link import CompiledModule, ProgramPlan
from qsearch.measure.measurement import Memory
from qsearch.quantize.program import Program

__all__ = ["measure_memory", "plan_memory"]


def measure_memory(module: CompiledModule) -> Memory:
    """Count weights, activations and kernel workspace.

    Activations are the arena that all intermediate values share, the output, and the input, which the caller
    holds. Workspace is the largest scratch buffer of any kernel: kernels run one after another and TVM's pool hands
    the same memory to each. Both are allocated by the first inference and kept for the next; TVM rounds them up to
    whole pages.
    """
    activations = module.arena_bytes + module.program.input.bytes + module.program.output.bytes
    return Memory(module.weight_bytes, activations, module.workspace_bytes)


def plan_memory(plan: ProgramPlan, program: Program) -> Memory:
    """What `measure_memory` would count of a program's module, without building it."""
    activations = plan.arena_bytes + program.input.bytes + program.output.bytes
    return Memory(plan.weight_bytes, activations, plan.workspace_bytes)
