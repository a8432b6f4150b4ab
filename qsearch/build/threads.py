"""How many threads compiled modules run on, and when it is better to run on one.

TVM's pool waits for work by yielding the processor in a loop. Alone on the machine that is the fastest way: a
kernel's tasks start within two microseconds. Beside another busy process every yield gives that process a whole
time slice, and a network of fifty kernels becomes ten times slower than on one thread (measured; threads bound to
processors make it worse, threads that sleep instead of spinning cost a fifth of the gain of a second thread). So
threads are not bound, and a module that finds its threads being switched out goes on with one thread until there
is an idle processor again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["ThreadedModule", "use_threads"]

# Involuntary switches during one call that show another process at work, and calls in a row that must show them.
CONTENDED_SWITCHES = 4
CONTENDED_CALLS = 3
# Seconds between two looks for an idle processor, and the idle share of the processors wanted that is enough.
LOOK_SECONDS = 0.25
IDLE_SHARE = 0.8


def use_threads(count: int) -> None:
    """Give TVM's pool this many threads.

    Args:
        count: Threads, the calling one included.
    """
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    if os.environ.get("TVM_NUM_THREADS") == str(count):
        return
    # Read when the pool starts; a pool that has started must be told as well.
    os.environ["TVM_NUM_THREADS"] = str(count)
    _configure(count)


def _configure(count: int) -> None:
    import tvm

    configure = tvm.get_global_func("runtime.config_threadpool", allow_missing=True)
    if configure is not None:
        configure(1, count)


class ThreadedModule:
    """A call of a compiled module that gives way when its threads do not have processors of their own.

    Args:
        function: What to call, for example `machine["main"]`.
        threads: Threads of the module's target.
    """

    def __init__(self, function: Callable[..., Any], threads: int) -> None:
        self.function, self.threads = function, threads
        self.single = False
        self._contended = 0
        self._looked = (0.0, 0.0)

    def __call__(self, *arguments: Any) -> Any:
        """Call it."""
        if self.threads == 1:
            return self.function(*arguments)
        if self.single:
            self._look()
            return self.function(*arguments)
        before = _switches()
        result = self.function(*arguments)
        self._contended = self._contended + 1 if _switches() - before >= CONTENDED_SWITCHES else 0
        if self._contended >= CONTENDED_CALLS:
            self._become(single=True)
        return result

    def _become(self, single: bool) -> None:
        self.single, self._contended = single, 0
        _configure(1 if single else self.threads)
        self._looked = time.monotonic(), _idle_seconds()

    def _look(self) -> None:
        """Take all threads again once as many processors as they need were idle since the last look."""
        now, (then, idle) = time.monotonic(), self._looked
        if now - then < LOOK_SECONDS:
            return
        idle_now = _idle_seconds()
        self._looked = now, idle_now
        if idle_now - idle >= IDLE_SHARE * (self.threads - 1) * (now - then):
            self._become(single=False)


def _switches() -> int:
    """Times that this process's threads were made to wait for a processor."""
    try:
        import resource
    except ImportError:  # not a Unix
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _idle_seconds() -> float:
    """Seconds that the processors this process may use have been idle, all added up."""
    try:
        mine = {f"cpu{index}" for index in os.sched_getaffinity(0)}
        rows = [line.split() for line in Path("/proc/stat").read_text(encoding="ascii").splitlines()]
        return sum(int(row[4]) for row in rows if row[0] in mine) / os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError):
        # Nothing to see here: the clock stands for it, so that the threads are tried again at every look.
        return time.monotonic() * (os.cpu_count() or 1)
