"""Split costs that depend on a few layers each into terms of single layers and of pairs of layers.

A graph node's kernels depend on the precisions of the layers around it. Its cost is sampled over mixed
configurations and fitted by terms of just those layers, so that the whole network's cost is a pairwise sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from qsearch.models.graph import Graph
from qsearch.search.tables.pairwise import PairwiseSum

__all__ = ["covering", "fit_costs", "layers_around", "mixture", "pairs_around"]

# Precisions of the layers around a node that are told apart; more would make the fit of a node ambiguous.
MAX_AROUND = 6
# Sampled configurations per term of the largest node.
SAMPLES_PER_TERM = 4
# Random assignments of which the one that covers most is taken.
DRAFTS = 8
# Pulls terms towards zero where samples cannot tell two apart.
RIDGE = 1e-6


def layers_around(graph: Graph) -> dict[str, tuple[str, ...]]:
    """Node -> the layers whose precisions decide how it reads and writes, the nearest first.

    Itself; the layers that its inputs come out of; those that read what it writes; those that read its inputs too.
    """
    sources: dict[str, tuple[str, ...]] = {}
    for node in graph.nodes:
        sources[node.name] = (node.name,) if node.is_layer else _union(sources[name] for name in node.inputs)
    readers: dict[str, tuple[str, ...]] = {}
    for node in reversed(graph.nodes):
        consumers = graph.consumers[node.name]
        readers[node.name] = _union((one.name,) if one.is_layer else readers[one.name] for one in consumers)
    found = {}
    for node in graph.nodes:
        own = (node.name,) if node.is_layer else ()
        given = _union(sources[name] for name in node.inputs)
        found[node.name] = _union([own, given, readers[node.name], *(readers[name] for name in node.inputs)])[:MAX_AROUND]
    return found


def pairs_around(graph: Graph, layers: Iterable[str]) -> list[tuple[int, int]]:
    """Pairs of layers that some node depends on together: neighbours, and those whose values are added; i < j, in order."""
    index = {name: i for i, name in enumerate(layers)}
    pairs: set[tuple[int, int]] = set()
    for around in layers_around(graph).values():
        pairs |= {(min(a, b), max(a, b)) for a, b in itertools.combinations((index[name] for name in around), 2)}
    return sorted(pairs)


def _union(groups: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(itertools.chain.from_iterable(groups)))


def covering(sizes: Sequence[int], pairs: Sequence[tuple[int, int]], rng: np.random.Generator, limit: int = 64) -> np.ndarray:
    """Assignments in which every two values of every pair of variables meet at least once, uniform ones among them.

    Args:
        sizes: Values of every variable.
        pairs: Which variables must meet.
        rng: Source of randomness.
        limit: Most assignments.

    Returns:
        int64 (N, variables).
    """
    uniform = [[min(value, size - 1) for size in sizes] for value in range(max(sizes))]
    chosen = [np.array(row) for row in dict.fromkeys(map(tuple, uniform))]
    missing = {(i, j, a, b) for i, j in pairs for a in range(sizes[i]) for b in range(sizes[j])}
    while True:
        missing -= {(i, j, int(row[i]), int(row[j])) for row in chosen[-max(sizes) :] for i, j in pairs}
        if not missing or len(chosen) >= limit:
            return np.array(chosen)
        drafts = [np.array([rng.integers(size) for size in sizes]) for _ in range(DRAFTS)]
        chosen.append(max(drafts, key=lambda row: sum((i, j, int(row[i]), int(row[j])) in missing for i, j in pairs)))


def fit_costs(
    graph: Graph,
    layers: Mapping[str, tuple[str, ...]],
    node_costs: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    kinds: int,
    rng: np.random.Generator,
) -> list[PairwiseSum]:
    """Split the costs of nodes into terms of layers and pairs of layers.

    Args:
        graph: The layer graph.
        layers: Layer -> its precisions, in the order of the variables.
        node_costs: Assignment (variables,) -> node name -> its costs, float64 (kinds,).
        kinds: Number of costs of a node.
        rng: Source of randomness.

    Returns:
        For each kind the sum over all nodes; exact where a node's cost has terms of at most two layers.
    """
    names = list(layers)
    index = {name: i for i, name in enumerate(names)}
    sizes = [len(layers[name]) for name in names]
    scopes = {node: tuple(sorted(index[one] for one in around)) for node, around in layers_around(graph).items()}
    terms = max((len(_columns(scope, sizes)) for scope in scopes.values()), default=1)
    count = max(64, SAMPLES_PER_TERM * (terms + 1))
    samples = np.array([mixture(sizes, rng) for _ in range(count)])
    costs = [node_costs(row) for row in samples]
    nothing = np.zeros(kinds)
    values = {node: np.array([one.get(node, nothing) for one in costs]) for node in scopes}
    return [_sum_of_nodes(scopes, sizes, samples, {node: found[:, k] for node, found in values.items()}) for k in range(kinds)]


def _sum_of_nodes(
    scopes: Mapping[str, tuple[int, ...]], sizes: Sequence[int], samples: np.ndarray, costs: Mapping[str, np.ndarray]
) -> PairwiseSum:
    unary = [np.zeros(size) for size in sizes]
    pairs: dict[tuple[int, int], np.ndarray] = {}
    constant = 0.0
    for node, scope in scopes.items():
        constant += _fit_node(scope, samples, costs[node], unary, pairs)
    return PairwiseSum(tuple(unary), {pair: table for pair, table in pairs.items() if np.ptp(table) > 0}, constant)


def mixture(sizes: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """A random assignment, from nearly uniform to thoroughly mixed."""
    share = rng.dirichlet(np.full(max(sizes), 0.7))
    return np.array([rng.choice(size, p=share[:size] / share[:size].sum()) for size in sizes])


_Column = tuple[tuple[int, int], ...]


def _columns(scope: Sequence[int], sizes: Sequence[int]) -> list[_Column]:
    """Terms of a node beside its constant: (variable, value) alone and two by two, but for every first value."""
    single = [((i, a),) for i in scope for a in range(1, sizes[i])]
    double = [(one[0], other[0]) for one, other in itertools.combinations(single, 2) if one[0][0] != other[0][0]]
    return [*single, *double]


def _fit_node(
    scope: Sequence[int],
    samples: np.ndarray,
    values: np.ndarray,
    unary: list[np.ndarray],
    pairs: dict[tuple[int, int], np.ndarray],
) -> float:
    """Add a node's terms; returns its constant."""
    sizes = [len(term) for term in unary]
    columns = _columns(scope, sizes)
    if not columns or np.ptp(values) == 0:
        return float(values.mean())
    design = np.ones((len(samples), 1 + len(columns)))
    for k, column in enumerate(columns):
        design[:, 1 + k] = np.all([samples[:, i] == a for i, a in column], axis=0)
    gram = design.T @ design
    penalty = np.diag([0.0, *(RIDGE * len(samples) * len(column) ** 2 for column in columns)])
    weights = np.linalg.solve(gram + penalty + 1e-12 * np.eye(len(gram)), design.T @ values)
    for column, weight in zip(columns, weights[1:], strict=True):
        if len(column) == 1:
            (i, a) = column[0]
            unary[i][a] += weight
        else:
            (i, a), (j, b) = column
            pairs.setdefault((i, j), np.zeros((sizes[i], sizes[j])))[a, b] += weight
    return float(weights[0])
