"""Cut a graph into blocks that pass on a single value, or into single nodes, for methods that treat one after the other."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from qsearch.models.graph import Conv, Graph, Model, Node

__all__ = ["Block", "blocks_of", "divided"]

# Layers of a block, at least: those of an inverted residual, or of a residual with its shortcut.
LAYERS = 3


@dataclass(frozen=True)
class Block:
    """Consecutive nodes between two values that everything passes through, or a node alone.

    Attributes:
        source: Name of the value that it reads.
        nodes: Its nodes, in graph order; the last one's value is what it passes on.
        others: Names of further values that it reads, such as the residual of a layer alone.
    """

    source: str
    nodes: tuple[Node, ...]
    others: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of its layers."""
        return tuple(node.name for node in self.nodes if node.is_layer)

    def model(self, whole: Model) -> Model:
        """The block as a model of its own, whose input is the value that it reads; what else it reads has to be known."""
        given = (
            replace(whole.graph.by_name[name], op="input", inputs=(), conv=Conv(), clip=None, residual=False, activation=None)
            for name in (self.source, *self.others)
        )
        graph = Graph((*given, *self.nodes), self.nodes[-1].name)
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


def divided(blocks: Sequence[Block], alone: Collection[str]) -> tuple[Block, ...]:
    """Divide blocks into their nodes where a layer shall be treated alone.

    Args:
        blocks: Blocks in graph order.
        alone: Names of such layers.
    """
    return tuple(part for block in blocks for part in (_nodes_of(block) if set(alone) & set(block.layers) else (block,)))


def _nodes_of(block: Block) -> tuple[Block, ...]:
    parts = []
    for node in block.nodes:
        source, *others = dict.fromkeys(node.inputs)
        parts.append(Block(source, (node,), tuple(others)))
    return tuple(parts)
