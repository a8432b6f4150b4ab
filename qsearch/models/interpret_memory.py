"""The interpreter's operations over memory: data movement, strided products, normalisations of rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qsearch.models.graph import Graph, Node, Parameters

__all__ = ["MEMORY_OPERATIONS", "images_run"]

# Each takes the node, its inputs, the parameters, and how many of the graph's batches the images are: a value of
# several batches holds them one after the other.
MemoryOperation = Callable[[Node, list[Tensor], Parameters, int], Tensor]


def _memory(x: Tensor) -> Tensor:
    """The elements in the order of memory, flat: channels last for four axes."""
    return (x.permute(0, 2, 3, 1) if x.dim() == 4 else x).reshape(-1)


def _from_memory(flat: Tensor, shape: tuple[int, ...], parts: int) -> Tensor:
    """Undo `_memory` for a value of the node's shape times `parts`."""
    if len(shape) != 4:
        return flat.reshape(shape[0] * parts, *shape[1:])
    n, c, h, w = shape
    return flat.reshape(n * parts, h, w, c).permute(0, 3, 1, 2)


def _view(node: Node, inputs: list[Tensor], parameters: Parameters, parts: int) -> Tensor:
    return _from_memory(_memory(inputs[0]), node.shape, parts)


def _gather(node: Node, inputs: list[Tensor], parameters: Parameters, parts: int) -> Tensor:
    starts = torch.from_numpy(parameters.constants[node.constants[0]].astype(np.int64))
    length = int(np.prod(node.shape)) // len(starts)
    places = torch.where(starts[:, None] < 0, -1, starts[:, None] + torch.arange(length)).reshape(-1)
    # A zero after the last element is what a place of -1 finds.
    padded = F.pad(_memory(inputs[0]).reshape(parts, -1), (0, 1))
    return _from_memory(padded[:, places].reshape(-1), node.shape, parts)


def _matmul(node: Node, inputs: list[Tensor], parameters: Parameters, parts: int) -> Tensor:
    matmul = node.matmul
    (*batch, m, n, k), results = matmul.extents, []
    pairs = zip(*(_memory(x).reshape(parts, -1) for x in inputs), strict=True)
    for a, b in pairs:
        left = a[matmul.a[0] :].as_strided((*batch, m, k), matmul.a[1:])
        right = b[matmul.b[0] :].as_strided((*batch, k, n), matmul.b[1:])
        result = torch.empty(int(np.prod(node.shape)))
        result[matmul.out[0] :].as_strided((*batch, m, n), matmul.out[1:]).copy_(left @ right * matmul.factor)
        results.append(result)
    return _from_memory(torch.cat(results), node.shape, parts)


def _repeated(node: Node, x: Tensor, parameters: Parameters, parts: int) -> tuple[Tensor, Tensor]:
    """A value as rows as long as the node's constant, and the constant."""
    constant = torch.from_numpy(parameters.constants[node.constants[0]])
    return _memory(x).reshape(-1, len(constant)), constant


def _scale(node: Node, inputs: list[Tensor], parameters: Parameters, parts: int) -> Tensor:
    rows, constant = _repeated(node, inputs[0], parameters, parts)
    return _from_memory(rows * constant, node.shape, parts)


def _shift(node: Node, inputs: list[Tensor], parameters: Parameters, parts: int) -> Tensor:
    rows, constant = _repeated(node, inputs[0], parameters, parts)
    return _from_memory(rows + constant, node.shape, parts)


def _softmax(node: Node, inputs: list[Tensor], parameters: Parameters, parts: int) -> Tensor:
    x = _shift(node, inputs, parameters, parts) if node.constants else inputs[0]
    return x.softmax(-1)


def _layer_norm(node: Node, inputs: list[Tensor], parameters: Parameters, parts: int) -> Tensor:
    weight, bias = (torch.from_numpy(parameters.constants[name]) for name in node.constants)
    return F.layer_norm(inputs[0], node.shape[-1:], weight, bias, node.epsilon)


def _l2_normalize(node: Node, inputs: list[Tensor], parameters: Parameters, parts: int) -> Tensor:
    return F.normalize(inputs[0], dim=-1, eps=node.epsilon)


MEMORY_OPERATIONS: dict[str, MemoryOperation] = {
    "view": _view,
    "gather": _gather,
    "matmul": _matmul,
    "scale": _scale,
    "shift": _shift,
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "l2_normalize": _l2_normalize,
}


def images_run(graph: Graph, count: int) -> int:
    """How many images the interpreter runs for so many: more where an operation holds the graph's batch, to be a multiple of it.

    Args:
        graph: The graph.
        count: Images given.
    """
    batch = graph.input.shape[0]
    holds = batch > 1 and any(node.op == "foreign" or node.op in MEMORY_OPERATIONS for node in graph.nodes)
    return -(-count // batch) * batch if holds else count
