"""The layer graph while it is being imported, and the vocabulary that converters share."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from qsearch.models.graph import ForeignOp, Node, Parameters
from qsearch.models.views import View

__all__ = ["Builder", "FxNode", "argument", "foreign", "pair", "place", "shape_of"]

# fx types the arguments of a node as a union of everything; what a converter finds there it checks itself.
FxNode = Any
# Operators that read a tensor's shape and dtype, never its values.
SHAPE_ONLY = tuple(
    f"aten.{name}.default" for name in ("new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like")
)


@dataclass
class Builder:
    """The layer graph while it is being imported.

    Attributes:
        constants: Placeholder name -> (parameter name, tensor).
        nodes: Nodes so far.
        values: fx node -> name of the node that holds its value.
        folded: fx node -> tensor, for values that do not depend on the image.
        parameters: Weights so far.
        views: fx node -> where its value lies, for values that no node holds as they are.
    """

    constants: dict[str, tuple[str, torch.Tensor]]
    nodes: list[Node] = field(default_factory=list)
    values: dict[fx.Node, str] = field(default_factory=dict)
    folded: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    parameters: Parameters = field(default_factory=Parameters)
    views: dict[fx.Node, View] = field(default_factory=dict)

    def tensor(self, node: Any) -> torch.Tensor | None:
        """The tensor of a parameter or folded constant, None for values that depend on the image."""
        if not isinstance(node, fx.Node):
            return None
        return self.constants[node.name][1] if node.name in self.constants else self.folded.get(node)

    def is_constant(self, node: FxNode) -> bool:
        """True if no argument depends on the image, or only its shape matters."""
        return str(node.target) in SHAPE_ONLY or all(self.tensor(source) is not None for source in node.all_input_nodes)

    def fold(self, node: FxNode) -> None:
        """Compute a constant now."""

        def given(source: FxNode) -> torch.Tensor:
            known = self.tensor(source)
            return torch.zeros(shape_of(source)) if known is None else known

        arguments, keywords = fx.node.map_arg((node.args, node.kwargs), given)
        self.folded[node] = node.target(*arguments, **keywords)

    def add(self, fx_node: FxNode, node: Node) -> bool:
        """Append a node under a unique name and let `fx_node` stand for it."""
        self.values[fx_node] = self.append(node)
        return True

    def append(self, node: Node, *constants: np.ndarray) -> str:
        """Append a node, and the constants it reads, under a unique name; that name."""
        taken = {known.name for known in self.nodes}
        name, count = node.name, 1
        while name in taken:
            count += 1
            name = f"{node.name}#{count}"
        names = tuple(f"{name}:{i}" for i in range(len(constants)))
        self.parameters.constants.update(zip(names, constants, strict=True))
        self.nodes.append(replace(node, name=name, constants=names))
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape of a node by name."""
        return next(node.shape for node in reversed(self.nodes) if node.name == name)

    def alias(self, fx_node: FxNode, source: FxNode) -> bool:
        """Let `fx_node` stand for the value of `source`."""
        self.values[fx_node] = self.values[source]
        return True


def place(node: FxNode) -> str:
    """The user's module path of an operator, or 'path.operator' where the module holds several."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = stack[-1] if stack else ("", "")
    leaf = isinstance(kind, str) and kind.startswith("torch.nn.modules.") and "container" not in kind
    operator = str(node.target).split(".")[1] if "." in str(node.target) else node.name
    return path if path and leaf else f"{path}.{operator}".lstrip(".")


def shape_of(node: FxNode) -> tuple[int, ...]:
    """Logical shape of an fx node's value."""
    return tuple(int(extent) for extent in node.meta["val"].shape)


def foreign(builder: Builder, node: FxNode, index: int = 0) -> bool:
    """Keep an operator as it is: it will run in float through TVM's own legalisation."""
    inputs: list[str] = []

    def encode(value: Any) -> Any:
        if isinstance(value, fx.Node):
            constant = builder.tensor(value)
            if constant is None:
                inputs.append(builder.values[value])
                return {"tensor": len(inputs) - 1}
            name = builder.constants[value.name][0] if value.name in builder.constants else value.name
            builder.parameters.constants[name] = constant.numpy()
            return {"parameter": name}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, (list, tuple)):
            return [encode(item) for item in value]
        return value if isinstance(value, (bool, int, float, str, type(None))) else None

    call = {"args": encode(node.args), "kwargs": {key: encode(value) for key, value in node.kwargs.items()}, "output": index}
    value = node.meta["val"]
    shape = tuple(int(extent) for extent in (value[index] if isinstance(value, (tuple, list)) else value).shape)
    operator = ForeignOp(str(node.target), json.dumps(call, sort_keys=True))
    return builder.add(node, Node(place(node), "foreign", tuple(inputs), shape, foreign=operator))


def argument(node: FxNode, position: int, name: str, default: Any) -> Any:
    """An argument by position or keyword."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def pair(value: Any) -> tuple[int, int]:
    """A one- or two-element list as a pair."""
    values = [value] if isinstance(value, int) else list(value)
    return (int(values[0]), int(values[-1]))
