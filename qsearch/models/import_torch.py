"""Import a torch model: torch.export -> functional ATen graph -> layer graph with folded batch norm.

The exported program is made functional first (no in-place operators), then walked once. Operators with a
lowering of their own become nodes; anything else becomes a foreign node that names its ATen overload.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import fx, nn

from qsearch.errors import UnsupportedModelError
from qsearch.models.convert_ops import convert, convert_element
from qsearch.models.fuse import fuse
from qsearch.models.graph import Graph, Model, Node
from qsearch.models.graph_builder import Builder, FxNode
from qsearch.models.interpret import interpret
from qsearch.models.memory import settle

__all__ = ["export_module", "import_model"]

# Largest difference between the layer graph and the torch module, relative to the largest output.
IMPORT_TOLERANCE = 1e-3


def import_model(name: str, module: nn.Module | torch.export.ExportedProgram, shape: tuple[int, int, int, int]) -> Model:
    """Import a classifier or a detector.

    Args:
        name: Name of the model, for messages and reports.
        module: An evaluation-mode module or an exported program.
        shape: (N, C, H, W) of its single float32 input.

    Returns:
        The layer graph and its parameters.

    Raises:
        UnsupportedModelError: The model cannot be exported, has several inputs or outputs, or does not compute
            the same as its layer graph.
    """
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    program = _exported(name, module, example)
    builder = Builder(_constants(program))
    _check_placeholders(name, program, shape)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            _placeholder(builder, program, node, shape)
        elif node.op == "call_function":
            _call(name, builder, node)
    output = _output(name, builder, program)
    graph, parameters = fuse(Graph(tuple(builder.nodes), output), builder.parameters)
    model = Model(name, graph, parameters)
    _check_same(model, module, example)
    return model


def export_module(name: str, module: nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    """Trace a module.

    Args:
        name: Name of the model, for messages.
        module: In evaluation mode.
        example: Its input, float32 (N, C, H, W).

    Raises:
        UnsupportedModelError: torch cannot trace it.
    """
    with _tracing(name, example):
        return torch.export.export(module, (example,))


def _exported(name: str, module: nn.Module | torch.export.ExportedProgram, example: torch.Tensor) -> torch.export.ExportedProgram:
    with _tracing(name, example):
        if isinstance(module, nn.Module):
            module = torch.export.export(module.eval(), (example,))
        return module.run_decompositions({})


@contextmanager
def _tracing(name: str, example: torch.Tensor) -> Iterator[None]:
    """Say what the user needs to know of a model that torch cannot trace."""
    try:
        # torch prints the graph it could not trace; the reason below says what the user needs.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # torch.export raises dozens of kinds; each means the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModelError(
            f"torch.export cannot trace model {name!r} for an input of shape {tuple(example.shape)}: {reason}. "
            "qsearch needs a model whose forward takes one image tensor and has no data-dependent control flow"
        ) from error


def _constants(program: torch.export.ExportedProgram) -> dict[str, tuple[str, torch.Tensor]]:
    """Placeholder name -> (the user's own parameter name, its tensor)."""
    signature = program.graph_signature
    tables = (signature.inputs_to_parameters, signature.inputs_to_buffers, signature.inputs_to_lifted_tensor_constants)
    values = {**program.state_dict, **program.constants}
    return {key: (full, values[full].detach()) for table in tables for key, full in table.items()}


def _check_placeholders(name: str, program: torch.export.ExportedProgram, shape: tuple[int, ...]) -> None:
    inputs = [
        node for node in program.graph.nodes if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    ]
    if len(inputs) != 1:
        raise UnsupportedModelError(f"model {name!r} takes {len(inputs)} inputs; qsearch needs exactly one image tensor")
    found = tuple(inputs[0].meta["val"].shape)
    if found != shape:
        raise UnsupportedModelError(
            f"model {name!r} was exported for an input of shape {found}, but preprocessing and batch give {shape}; "
            f"export it with a static batch of {shape[0]}, or pass a matching --preprocessing file"
        )


def _placeholder(builder: Builder, program: torch.export.ExportedProgram, node: fx.Node, shape: tuple[int, ...]) -> None:
    if node.name in program.graph_signature.user_inputs:
        builder.nodes.append(Node("input", "input", (), shape))
        builder.values[node] = "input"


def _call(name: str, builder: Builder, node: FxNode) -> None:
    target = str(node.target)
    if target == "<built-in function getitem>":
        source, index = node.args
        # Tuple results are converted by their getitem, which knows which element is wanted.
        convert_element(builder, node, source, index)
        return
    if isinstance(node.meta.get("val"), (tuple, list)):
        return
    if builder.is_constant(node):
        builder.fold(node)
    else:
        convert(builder, node)
    value = node.meta.get("val")
    if node in builder.values and isinstance(value, torch.Tensor) and value.dtype != torch.float32:
        raise UnsupportedModelError(
            f"model {name!r}: {target} produces {value.dtype}, but every value that depends on the image must be float32"
        )


def _output(name: str, builder: Builder, program: torch.export.ExportedProgram) -> str:
    output = next(node for node in program.graph.nodes if node.op == "output")
    results = [value for value in torch.utils._pytree.tree_leaves(output.args) if isinstance(value, fx.Node)]
    if len(results) == 1 and results[0] in builder.views:
        settle(builder, results[0])
    if len(results) != 1 or results[0] not in builder.values:
        raise UnsupportedModelError(f"model {name!r} returns {len(results)} tensors; wrap it so that it returns the logits alone")
    value = results[0].meta["val"]
    if value.dim() not in (2, 3):
        raise UnsupportedModelError(
            f"model {name!r} returns shape {tuple(value.shape)}; a classifier returns (batch, classes), a detector "
            "(batch, positions, 4 + classes)"
        )
    return builder.values[results[0]]


def _check_same(model: Model, module: Any, example: torch.Tensor) -> None:
    """The import is verified, not trusted: the layer graph must compute what the module computes."""
    runnable = module if isinstance(module, nn.Module) else module.module()
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(runnable(example))[0].float()
    found = interpret(model, example)
    # Where the module itself overflows on random numbers there is nothing to compare; real images are checked by the float pass.
    known = torch.isfinite(expected)
    agree = bool((torch.isfinite(found) == known).all())
    found, expected = found[known], expected[known]
    difference = (found - expected).abs().amax().item() / max(expected.abs().amax().item(), 1e-12) if len(expected) else 0.0
    if not agree or not difference <= IMPORT_TOLERANCE:
        raise UnsupportedModelError(
            f"the layer graph of model {model.name!r} differs from the torch module by {difference:.2g} (relative); "
            "this is a gap in qsearch's import: please report the model"
        )
