"""TVM's thread pool: how many threads run a module's kernels, and how they wait for work."""

from __future__ import annotations

import os

__all__ = ["use_threads"]


def use_threads(count: int) -> None:
    """Give this process's pool `count` threads, the caller's included.

    Must be called before the first kernel runs: TVM reads the variables when it starts the pool.
    """
    os.environ["TVM_NUM_THREADS"] = str(count)
