"""How many examples a property is tried on where each of them compiles something, or runs what was compiled."""

from __future__ import annotations

import os

# Set by a run of all tests, see `conftest`.
THOROUGH = "QSEARCH_THOROUGH"


def examples(count: int) -> int:
    """So many in a thorough run, half of them otherwise; few stay as they are.

    Properties are derandomized: the half is the same in every run.
    """
    return count if THOROUGH in os.environ else max(min(count, 3), -(-count // 2))
