"""Static selections of channels: concatenation, slices, splits and shuffles as one operation, and their composition.

A selection is a 'concat' node that keeps only the channels it lists. Selections of selections are composed, so that
each reads the values that were computed rather than copies of them: concat -> shuffle -> chunk, the end of a
ShuffleNet unit (Ma et al. 2018, "ShuffleNet V2", arXiv:1807.11164), becomes two selections that read both branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qsearch.models.graph import Graph, Node
from qsearch.models.graph_builder import Builder, FxNode, argument, place, shape_of

__all__ = ["compose_selections", "convert_channel_shuffle", "convert_concat", "convert_shuffled_view", "convert_slice", "select"]

# (value, channel) for every channel of a selection.
Picks = tuple[tuple[str, int], ...]
VIEWS = ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")
COPIES = ("aten.clone.default", "aten.contiguous.default")


def select(builder: Builder, node: FxNode, source: FxNode, channels: Sequence[int], operator: FxNode = None) -> bool:
    """Let `node` stand for some channels of `source`, in the order given; False where axis 1 does not hold channels.

    It is named after `operator`, by default itself.
    """
    shape = shape_of(source)
    if len(shape) not in (2, 4) or source not in builder.values or not channels:
        return False
    chosen = (shape[0], len(channels), *shape[2:])
    name = place(operator or node)
    return builder.add(node, Node(name, "concat", (builder.values[source],), chosen, channels=tuple(channels)))


def convert_concat(builder: Builder, node: FxNode) -> bool:
    """Concatenation over channels."""
    sources, axis = node.args[0], argument(node, 1, "dim", 0)
    rank = len(shape_of(node))
    if rank not in (2, 4) or axis % rank != 1 or any(source not in builder.values for source in sources):
        return False
    return builder.add(node, Node(place(node), "concat", tuple(builder.values[s] for s in sources), shape_of(node)))


def convert_slice(builder: Builder, node: FxNode) -> bool:
    """A slice of channels, with a step or without."""
    source, axis = node.args[0], int(argument(node, 1, "dim", 0))
    rank = len(shape_of(source))
    if axis % rank != 1:
        return False
    bounds = (argument(node, 2, "start", None), argument(node, 3, "end", None), argument(node, 4, "step", 1))
    if any(not isinstance(bound, int | None) for bound in bounds):
        return False
    return select(builder, node, source, range(shape_of(source)[1])[slice(*bounds)])


def convert_channel_shuffle(builder: Builder, node: FxNode) -> bool:
    """The operator of `torch.nn.ChannelShuffle`."""
    return select(builder, node, node.args[0], _shuffled(shape_of(node)[1], int(argument(node, 1, "groups", 1))))


def convert_shuffled_view(builder: Builder, node: FxNode) -> bool:
    """The last step of view(n, groups, c, h, w) -> transpose(1, 2) -> view(n, groups * c, h, w); False for others."""
    if str(node.target) not in VIEWS:
        return False
    swap = _see_through(node.args[0])
    if str(swap.target) not in ("aten.transpose.int", "aten.permute.default"):
        return False
    apart = _see_through(swap.args[0])
    if str(apart.target) not in VIEWS or len(shape_of(apart)) < 4:
        return False
    source, split = apart.args[0], shape_of(apart)
    axes = [int(axis) % len(split) for axis in (swap.args[1] if "permute" in str(swap.target) else swap.args[1:3])]
    swapped = axes == [0, 2, 1, *range(3, len(split))] if "permute" in str(swap.target) else sorted(axes) == [1, 2]
    whole = shape_of(source)
    if not swapped or shape_of(node) != whole or split != (whole[0], split[1], whole[1] // split[1], *whole[2:]):
        return False
    return select(builder, node, source, _shuffled(whole[1], split[1]))


def _see_through(node: FxNode) -> FxNode:
    return _see_through(node.args[0]) if str(node.target) in COPIES else node


def _shuffled(channels: int, groups: int) -> list[int]:
    each = channels // groups
    return [group * each + i for i in range(each) for group in range(groups)]


def compose_selections(graph: Graph) -> Graph:
    """Let selections read what the selections before them read, and drop those that select one value unchanged.

    A concatenation reads through another only where that is a plain join of runs: reading through a shuffle would
    break its own runs up, and the shuffled value would mostly be wanted anyway. A selection of a single value reads
    through whatever it is.
    """
    alias: dict[str, str] = {}
    picks: dict[str, Picks] = {}
    width = {node.name: node.shape[1] for node in graph.nodes if len(node.shape) > 1}
    nodes: list[Node] = []
    for node in graph.nodes:
        node = replace(node, inputs=tuple(alias.get(name, name) for name in node.inputs))
        if node.op == "concat":
            found = _composed(node, picks, width)
            sources = tuple(dict.fromkeys(name for name, _ in found))
            if len(sources) == 1 and found == _all_of(sources[0], width):
                alias[node.name] = sources[0]
                continue
            picks[node.name] = found
            node = replace(node, inputs=sources, channels=_channels(found, sources, width))
        nodes.append(node)
    return Graph(tuple(nodes), alias.get(graph.output, graph.output))


def _composed(node: Node, picks: dict[str, Picks], width: dict[str, int]) -> Picks:
    joined = [pick for name in node.inputs for pick in _all_of(name, width)]
    own = joined if node.channels is None else [joined[i] for i in node.channels]
    single = len(set(node.inputs)) == 1
    through = {name for name in node.inputs if name in picks and (single or _runs(picks[name]) <= _sources(picks[name]))}
    return tuple(picks[name][channel] if name in through else (name, channel) for name, channel in own)


def _all_of(name: str, width: dict[str, int]) -> Picks:
    return tuple((name, channel) for channel in range(width[name]))


def _runs(found: Picks) -> int:
    """Number of stretches of adjacent channels."""
    return 1 + sum(b != (a[0], a[1] + 1) for a, b in zip(found, found[1:], strict=False))


def _sources(found: Picks) -> int:
    return len({name for name, _ in found})


def _channels(found: Picks, sources: tuple[str, ...], width: dict[str, int]) -> tuple[int, ...] | None:
    """Positions within the concatenation of `sources`; None where they are all of it in order."""
    starts, total = {}, 0
    for name in sources:
        starts[name] = total
        total += width[name]
    chosen = tuple(starts[name] + channel for name, channel in found)
    return None if chosen == tuple(range(total)) else chosen
