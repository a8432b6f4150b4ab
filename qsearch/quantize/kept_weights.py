"""Prepared weights in memory: the most recently used ones, as far as they fit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from qsearch.models.graph import Model

__all__ = ["KeptWeights", "most_kept"]

# Bytes of prepared weights that are kept in any case. Modules hold them twice more, packed and as TVM's constants.
MOST_KEPT = 512 * 2**20
# And how often the float weights of a model may be kept: configurations that take turns find all of theirs.
FLOATS_KEPT = 4


class KeptWeights:
    """Weights by key; beyond so many bytes those that were not asked for longest are forgotten.

    Args:
        most_bytes: Of what is kept. What was kept last stays, however large.
    """

    def __init__(self, most_bytes: int = MOST_KEPT) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        """What is kept under a key, the same object each time; None for nothing."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: Hashable, weights: Any, size: int) -> None:
        """Keep what nothing is kept under the key of, of so many bytes."""
        self._kept[key] = weights, size
        self.bytes += size
        while self.bytes > self.most_bytes and len(self._kept) > 1:
            self.bytes -= self._kept.popitem(last=False)[1][1]


def most_kept(model: Model) -> int:
    """How many bytes of prepared weights to keep of a model and its variants together."""
    return max(MOST_KEPT, FLOATS_KEPT * sum(weight.nbytes for weight in model.parameters.weight.values()))
