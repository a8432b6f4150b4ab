"""Bring a torch value into the memory order that an operation wants, with as few copies as there can be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qsearch.models.graph import Node
from qsearch.models.graph_builder import Builder, FxNode, shape_of
from qsearch.models.views import View, memory_order, plain_view, runs

__all__ = [
    "Tokens",
    "as_shape",
    "elements_of",
    "held",
    "scaled",
    "see",
    "settle",
    "settle_inputs",
    "tokens_of",
    "tokens_shape",
    "view_of",
]


@dataclass(frozen=True)
class Tokens:
    """A value held as rows of its last axis.

    Attributes:
        node: Name of a node of shape (N, tokens, C).
        order: int64: row of the node's memory that each row of torch's value is.
    """

    node: str
    order: np.ndarray

    def rows(self, name: str, shape: tuple[int, ...]) -> View:
        """The view of a node with the same rows, of another length perhaps, for a value of torch's shape."""
        return View(name, (self.order[:, None] * shape[-1] + np.arange(shape[-1])).reshape(shape))


def view_of(builder: Builder, node: FxNode) -> View:
    """Where a value lies."""
    if node in builder.views:
        return builder.views[node]
    return plain_view(builder.values[node], shape_of(node))


def see(builder: Builder, node: FxNode, view: View) -> bool:
    """Let `node` stand for a view; a view that is a node's own value is held as such."""
    shape = builder.shape(view.node)
    if view.factor == 1.0 and view.index.shape == shape and np.array_equal(view.index, plain_view(view.node, shape).index):
        builder.values[node] = view.node
    else:
        builder.views[node] = view
    return True


def as_shape(builder: Builder, name: str, shape: tuple[int, ...]) -> str:
    """A node's memory under another shape."""
    source = next(node for node in builder.nodes if node.name == name)
    if source.op == "view":
        source = next(node for node in builder.nodes if node.name == source.inputs[0])
    if source.shape == shape:
        return source.name
    known = (node for node in builder.nodes if node.op == "view" and node.inputs == (source.name,) and node.shape == shape)
    found = next(known, None)
    return found.name if found else builder.append(Node(f"{source.name}.view", "view", (source.name,), shape))


def settle(builder: Builder, node: FxNode) -> str:
    """Hold a value as a node of torch's shape."""
    if node not in builder.values:
        view = builder.views[node]
        builder.values[node] = held(builder, scaled(builder, view), memory_order(view.index), shape_of(node))
    return builder.values[node]


def settle_inputs(builder: Builder, node: FxNode) -> None:
    """Hold everything that an operator reads as nodes of torch's shapes."""
    for source in node.all_input_nodes:
        if source in builder.views:
            settle(builder, source)


def tokens_of(builder: Builder, node: FxNode, ordered: bool = False) -> Tokens:
    """Hold a value as rows of its last axis, in whatever order they lie or in torch's."""
    view = view_of(builder, node)
    name, index = scaled(builder, view), view.index
    length = index.shape[-1]
    flat = index.reshape(-1, length)
    order, rest = np.divmod(flat[:, 0], length)
    whole = index.size == math.prod(builder.shape(name)) and not rest.any() and (flat == flat[:, :1] + np.arange(length)).all()
    shape = tokens_shape(builder, index.shape)
    if whole and np.array_equal(order if ordered else np.sort(order), np.arange(len(flat))):
        return Tokens(as_shape(builder, name, shape), order)
    return Tokens(held(builder, name, index.ravel(), shape), np.arange(len(flat)))


def tokens_shape(builder: Builder, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(N, tokens, C) for a value of torch's shape (..., C), where the batch divides the rows; (N, C) stays."""
    batch, rows, length = builder.nodes[0].shape[0], math.prod(shape[:-1]), shape[-1]
    if shape == (batch, length):
        return shape
    return (batch, rows // batch, length) if rows % batch == 0 else (1, rows, length)


def elements_of(builder: Builder, node: FxNode) -> View:
    """Hold a value as a node that has each of its elements once, in whatever order they lie."""
    view = view_of(builder, node)
    name = scaled(builder, view)
    if view.index.size == math.prod(builder.shape(name)) and np.array_equal(
        np.sort(view.index, None), np.arange(view.index.size)
    ):
        return View(name, view.index)
    name = held(builder, name, view.index.ravel(), tokens_shape(builder, view.index.shape))
    return View(name, np.arange(view.index.size).reshape(view.index.shape))


def scaled(builder: Builder, view: View) -> str:
    """The node that holds a view's elements times its factor."""
    if view.factor == 1.0:
        return view.node
    node = Node(f"{view.node}.scale", "scale", (view.node,), builder.shape(view.node))
    return builder.append(node, np.array([view.factor], np.float32))


def held(builder: Builder, name: str, flat: np.ndarray, shape: tuple[int, ...]) -> str:
    """A node of `shape` whose memory holds the elements `flat` of another's."""
    if np.array_equal(flat, np.arange(math.prod(builder.shape(name)))):
        return as_shape(builder, name, shape)
    starts, _ = runs(flat)
    for node in builder.nodes:
        if node.op == "gather" and node.inputs == (name,) and math.prod(node.shape) == len(flat):
            known = builder.parameters.constants[node.constants[0]]
            if np.array_equal(known, starts):
                return as_shape(builder, node.name, shape)
    return builder.append(Node(f"{name}.gather", "gather", (name,), shape), starts.astype(np.int32))
