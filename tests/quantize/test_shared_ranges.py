"""Values that concatenations only move share a scale, where nothing is lost by it."""

from __future__ import annotations

from networks import network, ranges_of

from qsearch.config import QuantConfig
from qsearch.models.graph import Graph, Node
from qsearch.quantize.lower import lower
from qsearch.quantize.shared_ranges import shared_ranges
from qsearch.quantize.weight_store import WeightStore

IMAGE = (1, 4, 2, 2)


def graph(*nodes: tuple[str, str, tuple[str, ...]]) -> tuple[Graph, frozenset[str]]:
    """A graph of (name, operation, inputs) after an input 'x', and its integer nodes."""
    made = [Node("x", "input", (), IMAGE), *(Node(name, op, inputs, IMAGE) for name, op, inputs in nodes)]
    return Graph(tuple(made), nodes[-1][0]), frozenset(name for name, _, _ in nodes)


def test_an_input_that_is_only_moved_takes_its_readers_range():
    made, integer = graph(
        ("a", "conv2d", ("x",)),
        ("b", "conv2d", ("x",)),
        ("pooled", "max_pool2d", ("b",)),
        ("joined", "concat", ("a", "pooled")),
        ("out", "conv2d", ("joined",)),
    )
    own = {"a": (0.0, 1.0), "b": (0.0, 2.0), "pooled": (0.0, 2.0), "joined": (0.0, 3.0), "x": (-1.0, 1.0), "out": (0.0, 1.0)}
    # The pooling passes the scale of its input on.
    assert shared_ranges(made, integer, own) == own | {"a": (0.0, 3.0), "b": (0.0, 3.0)}
    assert shared_ranges(made, integer - {"pooled"}, own) == own | {"a": (0.0, 3.0)}
    assert shared_ranges(made, integer - {"joined"}, own) == own


def test_an_input_that_others_read_keeps_its_own():
    made, integer = graph(("a", "conv2d", ("x",)), ("joined", "concat", ("a", "a")), ("out", "add", ("joined", "a")))
    own = {"x": (-1.0, 1.0), "a": (0.0, 1.0), "joined": (0.0, 3.0), "out": (0.0, 1.0)}
    assert shared_ranges(made, integer, own) == own


def halves(second: tuple[float, float]) -> dict[str, tuple[float, float]]:
    """Two concatenations that read the same layer and have these ranges: what all three get."""
    made, integer = graph(
        ("a", "conv2d", ("x",)),
        ("first", "concat", ("a",)),
        ("second", "concat", ("a",)),
        ("out", "add", ("first", "second")),
    )
    own = {"x": (-1.0, 1.0), "a": (-1.0, 5.0), "first": (-1.0, 1.0), "second": second, "out": (0.0, 1.0)}
    found = shared_ranges(made, integer, own)
    return {name: found[name] for name in ("a", "first", "second")}


def test_readers_of_one_input_agree_while_none_loses_more_than_a_bit():
    assert halves((-0.5, 3.0)) == dict.fromkeys(("a", "first", "second"), (-1.0, 3.0))
    assert halves((-0.5, 3.1)) == {"a": (-1.0, 5.0), "first": (-1.0, 1.0), "second": (-0.5, 3.1)}


def test_a_shuffled_network_copies_bytes():
    model = network("shuffle")[0]
    config = QuantConfig()
    program = lower(model, config, ranges_of(model, config), WeightStore())
    moves = [op for op in program.ops if op.key.kind == "concat"]
    assert len(moves) == 5 and all(all(op.key.copies) for op in moves)
