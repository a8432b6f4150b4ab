"""The sensitivity table as a sum: a term per layer, and one per pair of neighbours or residual partners.

The divergence of a configuration is, to second order, half the mean square of the sum of its layers' s (`sensitivity`). Its
diagonal are the layers' own divergences, its products of two s the couplings; those of layers that exchange a value or are
added to one another are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qsearch.config import QuantConfig
from qsearch.search.tables.pairwise import PairwiseSum
from qsearch.search.tables.sensitivity_table import Sensitivity

__all__ = ["divergence_sum"]

# With only some of the couplings the sum is no square any more and could fall below zero. So much of the layers' own
# divergences negative couplings may take away.
MOST_TAKEN = 0.9


def divergence_sum(table: Sensitivity, config: QuantConfig, pairs: Sequence[tuple[int, int]]) -> PairwiseSum:
    """The divergence in a configuration's setting.

    Args:
        table: Of one layer per variable, in the order of the variables.
        config: Gives all settings; its precisions do not matter.
        pairs: Variables whose coupling counts, i < j.

    Returns:
        Nats; at least 1 - MOST_TAKEN of the sum of the layers' own divergences, whatever the assignment.
    """
    own = table.divergence(config)
    names = list(own)
    partners = np.bincount(np.array(pairs, np.int64).reshape(-1), minlength=len(names))
    shares = [MOST_TAKEN * own[name] / max(count, 1) for name, count in zip(names, partners, strict=True)]
    couplings: Mapping[tuple[int, int], np.ndarray] = {
        (i, j): np.maximum(table.coupling((names[i], names[j]), config), -(shares[i][:, None] + shares[j][None, :]))
        for i, j in pairs
    }
    return PairwiseSum(tuple(own.values()), {pair: found for pair, found in couplings.items() if found.any()})
