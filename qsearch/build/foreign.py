"""Foreign operators: float operators without a kernel of qsearch's own, through TVM's legalisation.

The single ATen call is exported by torch, translated to Relax by TVM's own importer, legalised to loops, and
each loop nest becomes a kernel in the cache like any other. They are not scheduled: expect them to be slow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from qsearch.errors import BuildError
from qsearch.models.interpret import call_foreign
from qsearch.quantize.program import OpKey

__all__ = ["ForeignCall", "ForeignSteps", "legalize", "run_foreign"]


@dataclass(frozen=True)
class ForeignCall:
    """One legalised loop nest.

    Attributes:
        text: Content of its PrimFunc, for its identity.
        generate: Symbol name -> PrimFunc.
        inputs: Names it reads: 'input0', ..., a parameter's name, or an earlier call's output.
        output: Name it writes.
        shape: Shape of its output.
        dtype: Dtype of its output.
    """

    text: str
    generate: Callable[[str], Any]
    inputs: tuple[str, ...]
    output: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ForeignSteps:
    """Loop nests in order, the constants TVM's importer made, and the name of the result."""

    calls: tuple[ForeignCall, ...]
    constants: dict[str, np.ndarray]
    output: str


def run_foreign(key: OpKey, constants: dict[str, np.ndarray], inputs: list[np.ndarray]) -> np.ndarray:
    """Compute a foreign operation with torch, on physical arrays: the reference for `legalize`."""
    tensors = [torch.from_numpy(np.ascontiguousarray(value)) for value in inputs]
    parameters = {name: torch.from_numpy(value) for name, value in constants.items()}
    assert key.foreign is not None
    return call_foreign(key.foreign, tensors, parameters).contiguous().numpy()


class _Single(torch.nn.Module):
    """A module that makes one ATen call."""

    def __init__(self, key: OpKey, names: tuple[str, ...]) -> None:
        super().__init__()
        assert key.foreign is not None
        self.foreign, self.names = key.foreign, names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        count = len(tensors) - len(self.names)
        parameters = dict(zip(self.names, tensors[count:], strict=True))
        return call_foreign(self.foreign, list(tensors[:count]), parameters)


@lru_cache(maxsize=4096)
def legalize(key: OpKey, parameters: tuple[tuple[str, tuple[int, ...], str], ...]) -> ForeignSteps:
    """Translate a foreign operation into loop nests.

    Args:
        key: kind 'foreign'.
        parameters: (name, shape, dtype) of every constant it reads.

    Raises:
        BuildError: TVM does not know the operator.
    """
    import tvm
    from tvm import relax
    from tvm.relax.frontend.torch import from_exported_program

    assert key.foreign is not None
    examples = [torch.zeros(shape) for shape in key.shapes[:-1]]
    examples += [torch.zeros(shape, dtype=getattr(torch, dtype)) for _, shape, dtype in parameters]
    try:
        program = torch.export.export(_Single(key, tuple(name for name, _, _ in parameters)), tuple(examples))
        module = from_exported_program(program, unwrap_unit_return_tuple=True)
        passes = [relax.transform.DecomposeOpsForInference(), relax.transform.LegalizeOps(), relax.transform.FoldConstant()]
        module = tvm.transform.Sequential(passes)(module)
    except Exception as error:  # TVM and torch raise many kinds; each means that this operator is out of reach
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise BuildError(f"TVM cannot translate {key.foreign.target}: {reason}") from error
    return _collect(key, module, len(key.shapes) - 1, [name for name, _, _ in parameters])


def _collect(key: OpKey, module: Any, inputs: int, parameters: list[str]) -> ForeignSteps:
    import tvm
    from tvm import relax

    function = module["main"]
    names = {var: f"input{i}" if i < inputs else parameters[i - inputs] for i, var in enumerate(function.params)}
    constants: dict[str, np.ndarray] = {}
    calls: list[ForeignCall] = []
    tuples: dict[Any, list[Any]] = {}

    def name_of(value: Any) -> str:
        if isinstance(value, tvm.ir.Constant):
            name = f"constant{len(constants)}"
            constants[name] = value.value.numpy()
            return name
        return names[value]

    for block in function.body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Tuple):
                tuples[binding.var] = list(value.fields)
                continue
            if isinstance(value, relax.TupleGetItem):
                names[binding.var] = name_of(tuples[value.tuple_value][value.index])
                continue
            if not isinstance(value, relax.Call) or value.op.name != "relax.call_tir":
                if isinstance(value, (relax.Var, tvm.ir.Constant)):
                    names[binding.var] = name_of(value)
                    continue
                raise BuildError(f"{key.foreign.target} needs {value}, which qsearch cannot place in a module")  # type: ignore[union-attr]
            variable, arguments = value.args[0], value.args[1]
            kind = value.ty_args[0] if hasattr(value, "ty_args") else value.sinfo_args[0]
            name = f"step{len(calls)}"
            shape = tuple(int(extent) for extent in kind.shape)
            loops = module[variable]
            call = ForeignCall(
                loops.script(), _renamer(loops), tuple(name_of(a) for a in arguments), name, shape, str(kind.dtype)
            )
            calls.append(call)
            names[binding.var] = name
    return ForeignSteps(tuple(calls), constants, name_of(function.body.body))


def _renamer(loops: Any) -> Callable[[str], Any]:
    return lambda symbol: loops.with_attr("global_symbol", symbol)
