"""Selections of channels: imported as one operation, composed, and dropped where they select everything."""

from __future__ import annotations

import pytest
import torch
from networks import network
from torch import nn

from qsearch.models.import_torch import import_model
from qsearch.models.interpret import interpret

SHAPE = (1, 3, 6, 5)


class Wrapped(nn.Module):
    """Two convolutions, what is tested between them, and a head as wide as that makes it."""

    def __init__(self, middle, width):
        super().__init__()
        self.a, self.b, self.middle, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 3, padding=1), middle, nn.Conv2d(width, 4, 1)

    def forward(self, x):
        return self.head(self.middle(self.a(x), self.b(x))).mean((2, 3))


def shuffle(x, groups):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)


MIDDLES = {
    "concat of concats": (lambda a, b: torch.cat([torch.cat([a, b], 1), a], 1), 18, [(("a", "b"), (*range(12), *range(6)))]),
    "chunk of a concat": (lambda a, b: torch.cat([a, b], 1).chunk(2, 1)[1], 6, []),
    "shuffle and back": (lambda a, b: shuffle(shuffle(torch.cat([a, b], 1), 2), 6), 12, [(("a", "b"), None)]),
    "module": (lambda a, b: nn.ChannelShuffle(3)(a), 6, [(("a",), (0, 2, 4, 1, 3, 5))]),
    "half a shuffle": (lambda a, b: shuffle(torch.cat([a, b], 1), 2)[:, :6], 6, [(("a", "b"), (0, 6, 1, 7, 2, 8))]),
    "strided slice": (lambda a, b: b[:, ::2][:, 1:], 2, [(("b",), (2, 4))]),
    "uneven split": (lambda a, b: torch.cat(a.split([2, 4], 1)[::-1], 1), 6, [(("a",), (2, 3, 4, 5, 0, 1))]),
    "twice the same": (lambda a, b: torch.cat([a, a], 1), 12, [(("a",), (*range(6), *range(6)))]),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_selections_compose_and_compute_the_same(name):
    middle, width, expected = MIDDLES[name]
    torch.manual_seed(0)
    module = Wrapped(middle, width).eval()
    model = import_model(name, module, SHAPE)
    assert [(node.inputs, node.channels) for node in model.graph.nodes if node.op == "concat"] == expected
    assert not model.graph.foreign
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(interpret(model, x), module(x).detach(), rtol=1e-4, atol=1e-5)


def test_views_that_are_no_shuffle_are_not_taken_for_one():
    def other(a, b):
        n, c, h, w = a.shape
        return a.view(n, 2, 3, h, w).transpose(2, 3).reshape(n, c, h, w)

    module = Wrapped(other, 6).eval()
    model = import_model("other", module, SHAPE)
    operations = [node.op for node in model.graph.nodes]
    assert "concat" not in operations and operations.count("gather") == 1
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(interpret(model, x), module(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_shuffled_unit_reads_its_two_branches():
    graph = network("shuffle")[0].graph
    assert not graph.foreign
    selections = [node for node in graph.nodes if node.op == "concat"]
    # The half that the first layer takes, both halves of the first shuffle, all of the second, the last concatenation.
    assert [len(node.inputs) for node in selections] == [1, 2, 2, 2, 5]
    passed, taken = selections[1:3]
    assert passed.inputs == taken.inputs == ("stem.0", "units.0")
    assert passed.channels[:4] == (0, 20, 1, 21) and taken.channels[:2] == (5, 25)
