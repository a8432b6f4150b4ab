"""Cut a graph into blocks that pass on a single value, for methods that treat one block after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qsearch.models.graph import Conv, Graph, Model, Node

__all__ = ["Block", "blocks_of"]

# Layers of a block, at least: those of an inverted residual, or of a residual with its shortcut.
LAYERS = 3


@dataclass(frozen=True)
class Block:
    """Consecutive nodes between two values that everything passes through.

    Attributes:
        source: Name of the value that it reads.
        nodes: Its nodes, in graph order; the last one's value is what it passes on.
    """

    source: str
    nodes: tuple[Node, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of its layers."""
        return tuple(node.name for node in self.nodes if node.is_layer)

    def model(self, whole: Model) -> Model:
        """The block as a model of its own, whose input is the value that it reads."""
        given = replace(
            whole.graph.by_name[self.source], op="input", inputs=(), conv=Conv(), clip=None, residual=False, activation=None
        )
        graph = Graph((given, *self.nodes), self.nodes[-1].name)
        return Model(f"{whole.name}:{graph.output}", graph, whole.parameters)


def blocks_of(graph: Graph) -> tuple[Block, ...]:
    """Cut a graph where one value alone leads on, but not before a block has `LAYERS` layers.

    Args:
        graph: The graph.

    Returns:
        The blocks, in graph order; between them they hold every node but the input.
    """
    place = {node.name: i for i, node in enumerate(graph.nodes)}
    last_use = [max((place[reader.name] for reader in graph.consumers[node.name]), default=0) for node in graph.nodes]
    blocks, source, start, reach = [], graph.input.name, 1, last_use[0]
    for i, node in enumerate(graph.nodes[1:], 1):
        nodes = graph.nodes[start : i + 1]
        # Nothing before this node is read after it.
        alone = reach <= i
        if node.name == graph.output or (alone and sum(one.is_layer for one in nodes) >= LAYERS):
            blocks.append(Block(source, nodes))
            source, start = node.name, i + 1
        if node.name == graph.output:
            break
        reach = max(reach, last_use[i])
    return tuple(blocks)
