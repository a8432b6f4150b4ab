"""Let the values that a concatenation moves share one scale and zero point, so that it copies bytes.

An input that only integer concatenations read is better written with its reader's scale at once: it would be
rounded to it anyway. Where such an input has several readers (a DenseNet block, the two halves of a shuffled
ShuffleNet unit), the readers first agree on one range, as long as none of them loses more than one bit by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qsearch.models.graph import Graph, Node

__all__ = ["shared_ranges"]

Range = tuple[float, float]

# Operations that can write any scale, and those that pass theirs on from their input.
_WRITES_ANY = ("conv2d", "linear", "add", "mul", "avg_pool2d", "activation", "concat")
_PASSES_ON = ("max_pool2d", "flatten")
# One bit: the range of a concatenation may at most be doubled.
_LARGEST_WIDENING = 2.0


def shared_ranges(graph: Graph, integer: frozenset[str], ranges: dict[str, Range]) -> dict[str, Range]:
    """Replace the ranges of values that are moved by integer concatenations.

    Args:
        graph: The layer graph.
        integer: Nodes that compute in integers.
        ranges: Node name -> (low, high).

    Returns:
        The ranges, some of them widened to a range that several values share.
    """
    groups = _Groups(ranges)
    for node in graph.nodes:
        if node.op == "concat" and node.name in integer:
            groups.open(node.name)
    moved = {node.name: _destinations(graph, node, integer) for node in graph.nodes if node.name in integer}
    for node in graph.nodes:
        # A concatenation that others read in turn should agree with them.
        names = [node.name, *moved.get(node.name, ())] if node.op == "concat" else moved.get(node.name, [])
        for other in names[1:]:
            groups.merge(names[0], other)
    shared = {name: groups.range[group] for name, group in groups.of.items()}
    for node in graph.nodes:
        found = {groups.of[name] for name in moved.get(node.name, ())}
        if len(found) == 1 and node.op in _WRITES_ANY:
            shared.setdefault(node.name, groups.range[found.pop()])
    return ranges | shared


def _destinations(graph: Graph, node: Node, integer: frozenset[str]) -> list[str]:
    """The integer concatenations that move a value, some after a pooling; none where anything else reads it."""
    found: list[str] = []
    for reader in graph.consumers[node.name]:
        if reader.op == "concat" and reader.name in integer:
            found.append(reader.name)
            continue
        further = _destinations(graph, reader, integer) if reader.op in _PASSES_ON and reader.name in integer else []
        if not further:
            return []
        found += further
    return [] if node.name == graph.output else found


@dataclass
class _Groups:
    """Concatenations that share a range.

    Attributes:
        own: Node name -> the range it has by itself.
        of: Concatenation -> name of its group.
        members: Group -> its concatenations.
        range: Group -> the range they share.
    """

    own: dict[str, Range]
    of: dict[str, str] = field(default_factory=dict)
    members: dict[str, list[str]] = field(default_factory=dict)
    range: dict[str, Range] = field(default_factory=dict)

    def open(self, name: str) -> None:
        """Start a group of one."""
        self.of[name], self.members[name], self.range[name] = name, [name], self.own[name]

    def merge(self, first: str, second: str) -> None:
        """Join the groups of two concatenations, if that widens no member's range too much."""
        a, b = self.of[first], self.of[second]
        if a == b:
            return
        low, high = (pick(ends) for pick, ends in zip((min, max), zip(self.range[a], self.range[b], strict=True), strict=True))
        names = [*self.members[a], *self.members[b]]
        if high - low > _LARGEST_WIDENING * min(self.own[name][1] - self.own[name][0] for name in names):
            return
        self.members[a], self.range[a] = names, (low, high)
        for name in self.members.pop(b):
            self.of[name] = a
        del self.range[b]
