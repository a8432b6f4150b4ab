"""Sums of terms over single variables and pairs of them, and their exact minimum for many weightings at once.

A network's latency, bytes and divergence are nearly such sums over its layers' precisions: a term per layer, and a
term per pair of layers that exchange a value. The minimum is found by eliminating one variable after another
(dynamic programming over the graph of pairs; Bertele and Brioschi 1972, "Nonserial dynamic programming"), along
chains and residual branches alike; the work grows with the size of the largest table on the way, not with the
number of configurations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

__all__ = ["PairwiseSum", "combine", "each_in", "minimize", "nothing"]

# Entries of the largest table of an elimination; pairs with the least effect are left out until it fits.
MAX_TABLE = 1 << 16
# Entries of the tables of all weightings that are worked on together.
MAX_BATCH = 1 << 22


@dataclass(frozen=True)
class PairwiseSum:
    """constant + sum of unary[i][x_i] + sum of pairs[i, j][x_i, x_j].

    Attributes:
        unary: Variable -> float64 (values,).
        pairs: (i, j), i < j -> float64 (values of i, values of j).
        constant: What every assignment has.
    """

    unary: tuple[np.ndarray, ...]
    pairs: Mapping[tuple[int, int], np.ndarray]
    constant: float = 0.0

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Values of every variable."""
        return tuple(len(term) for term in self.unary)

    def __call__(self, assignments: np.ndarray) -> np.ndarray:
        """Values of assignments.

        Args:
            assignments: Integers (N, variables).

        Returns:
            float64 (N,).
        """
        total = np.full(len(assignments), self.constant)
        for i, term in enumerate(self.unary):
            total += term[assignments[:, i]]
        for (i, j), table in self.pairs.items():
            total += table[assignments[:, i], assignments[:, j]]
        return total

    def plus(self, unary: PairwiseSum) -> PairwiseSum:
        """The sum and another one that has no pairs."""
        terms = tuple(own + other for own, other in zip(self.unary, unary.unary, strict=True))
        return PairwiseSum(terms, self.pairs, self.constant + unary.constant)

    def scaled(self, factor: float) -> PairwiseSum:
        """The sum times a factor."""
        pairs = {pair: factor * table for pair, table in self.pairs.items()}
        return PairwiseSum(tuple(factor * term for term in self.unary), pairs, factor * self.constant)


def nothing(sizes: Sequence[int]) -> PairwiseSum:
    """The sum that is zero whatever the assignment."""
    return PairwiseSum(tuple(np.zeros(size) for size in sizes), {})


def each_in(sums: Sequence[PairwiseSum], assignments: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Every assignment's value in the sum that goes with it.

    Args:
        sums: Over the same variables.
        assignments: Integers (N, variables).
        which: Integers (N,), into the sums.

    Returns:
        float64 (N,).
    """
    total = np.zeros(len(assignments))
    for place in np.unique(which):
        here = which == place
        total[here] = sums[place](assignments[here])
    return total


def combine(sums: Sequence[PairwiseSum], weights: np.ndarray) -> tuple[list[np.ndarray], dict[tuple[int, int], np.ndarray]]:
    """Weighted sums, as terms with a leading axis for the weightings.

    Args:
        sums: Over the same variables.
        weights: float64 (B, len(sums)).

    Returns:
        Per variable (B, values), and per pair (B, values, values).
    """
    unary = [weights @ np.stack([one.unary[i] for one in sums]) for i in range(len(sums[0].unary))]
    pairs: dict[tuple[int, int], np.ndarray] = {}
    for pair in sorted({pair for one in sums for pair in one.pairs}):
        tables = [one.pairs.get(pair) for one in sums]
        shape = next(table.shape for table in tables if table is not None)
        stacked = np.stack([np.zeros(shape) if table is None else table for table in tables])
        pairs[pair] = np.tensordot(weights, stacked, 1)
    return unary, pairs


def minimize(sums: Sequence[PairwiseSum], weights: np.ndarray) -> np.ndarray:
    """Assignments that minimise weighted sums.

    Args:
        sums: Over the same variables.
        weights: float64 (B, len(sums)).

    Returns:
        int64 (B, variables); exact unless pairs had to be left out (`MAX_TABLE`).
    """
    sizes = sums[0].sizes
    effect = {pair: 0.0 for one in sums for pair in one.pairs}
    for k, one in enumerate(sums):
        for pair, table in one.pairs.items():
            effect[pair] += float(np.abs(weights[:, k]).mean() * np.ptp(table))
    order, width = _order(sizes, effect)
    batch = max(1, MAX_BATCH // width)
    found = [_eliminate(sums, weights[start : start + batch], order) for start in range(0, len(weights), batch)]
    return np.concatenate(found) if found else np.zeros((0, len(sizes)), np.int64)


# A variable and those that are left of its neighbours when it is eliminated.
_Step = tuple[int, tuple[int, ...]]


def _order(sizes: Sequence[int], effect: dict[tuple[int, int], float]) -> tuple[list[_Step], int]:
    """An order of elimination whose tables fit, and the entries of its largest; drops weak pairs from `effect`."""
    while True:
        order, width = _greedy_order(sizes, effect)
        if width <= MAX_TABLE or not effect:
            return order, width
        del effect[min(effect, key=lambda pair: effect[pair])]


def _greedy_order(sizes: Sequence[int], pairs: Mapping[tuple[int, int], float]) -> tuple[list[_Step], int]:
    """Always the variable whose table is smallest."""
    neighbours: dict[int, set[int]] = {i: set() for i in range(len(sizes))}
    for i, j in pairs:
        neighbours[i].add(j)
        neighbours[j].add(i)
    order: list[_Step] = []
    width = 1

    def table(i: int) -> int:
        return int(np.prod([float(sizes[k]) for k in (i, *neighbours[i])]))

    while neighbours:
        chosen = min(neighbours, key=lambda i: (table(i), i))
        width = max(width, table(chosen))
        near = neighbours.pop(chosen)
        for i in near:
            neighbours[i] = (neighbours[i] | near) - {i, chosen}
        order.append((chosen, tuple(sorted(near))))
    return order, width


def _eliminate(sums: Sequence[PairwiseSum], weights: np.ndarray, order: Sequence[_Step]) -> np.ndarray:
    unary, pairs = combine(sums, weights)
    # (variables, ascending; table with an axis for the weightings and one for each of them).
    tables: list[tuple[tuple[int, ...], np.ndarray]] = [((i,), term) for i, term in enumerate(unary)]
    reachable = {i: set(near) for i, near in order}
    tables += [(pair, table) for pair, table in pairs.items() if pair[1] in reachable[pair[0]] or pair[0] in reachable[pair[1]]]
    choices: dict[int, np.ndarray] = {}
    for variable, near in order:
        scope = (variable, *near)
        mine = [one for one in tables if variable in one[0]]
        tables = [one for one in tables if variable not in one[0]]
        total = sum(_aligned(names, table, scope) for names, table in mine)
        assert isinstance(total, np.ndarray)
        choices[variable] = total.argmin(1)
        # Terms that do not mention a neighbour leave an axis of one; it stays one until a term fills it.
        tables.append((near, total.min(1)))
    found = np.zeros((len(weights), len(unary)), np.int64)
    rows = np.arange(len(weights))
    for variable, near in reversed(order):
        table = choices[variable]
        index = [np.minimum(found[:, k], extent - 1) for k, extent in zip(near, table.shape[1:], strict=True)]
        found[:, variable] = table[(rows, *index)]
    return found


def _aligned(names: tuple[int, ...], table: np.ndarray, scope: tuple[int, ...]) -> np.ndarray:
    """A table with its axes in the order of a scope, one where it lacks a variable."""
    present = [name for name in scope if name in names]
    moved = table.transpose(0, *(1 + names.index(name) for name in present))
    shape = [len(table), *(moved.shape[1 + present.index(name)] if name in names else 1 for name in scope)]
    return moved.reshape(shape)
