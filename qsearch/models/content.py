"""Digests of what the values of a graph depend on, so that results can be kept by content.

Two values have the same digest where the same operations with the same parameters lead to them from the same input,
whatever follows them and whatever the nodes are called. A change of a late layer leaves those of the early ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from qsearch.models.graph import Model, Node

__all__ = ["array_digest", "value_digests"]


def value_digests(model: Model, source: str) -> dict[str, str]:
    """Digest every value of a model.

    Args:
        model: The model.
        source: Digest of the images that it is run on.

    Returns:
        Node name -> hexadecimal SHA-256.
    """
    found: dict[str, str] = {}
    for node in model.graph.nodes:
        described = asdict(node)
        # Names stand for parameters and inputs, which are digested themselves.
        for name in ("name", "inputs", "constants"):
            del described[name]
        parts = [described, [found[name] for name in node.inputs] or source, list(_parameters(node, model))]
        found[node.name] = hashlib.sha256(json.dumps(parts, sort_keys=True, default=_plain).encode()).hexdigest()
    return found


def array_digest(array: np.ndarray) -> str:
    """Hexadecimal SHA-256 of an array's type, shape and elements."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _parameters(node: Node, model: Model) -> Iterator[str]:
    tables = model.parameters
    for table in (tables.weight, tables.bias):
        if node.name in table:
            yield array_digest(table[node.name])
    for name in (*node.constants, *(node.foreign.parameters if node.foreign else ())):
        yield array_digest(tables.constants[name])


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else list(value)
