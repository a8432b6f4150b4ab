"""How many threads compiled modules run on."""

from __future__ import annotations

import os

__all__ = ["use_threads"]


def use_threads(count: int) -> None:
    """Give TVM's pool this many threads.

    Args:
        count: Threads, the calling one included.
    """
    if os.environ.get("TVM_NUM_THREADS") == str(count):
        return
    # Read when the pool starts; a pool that has started must be told as well.
    os.environ["TVM_NUM_THREADS"] = str(count)
    import tvm

    configure = tvm.get_global_func("runtime.config_threadpool", allow_missing=True)
    if configure is not None:
        configure(1, count)
