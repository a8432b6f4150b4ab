"""How many threads compiled modules run on, and when it is better to run on one.

TVM's pool waits for work by yielding the processor in a loop. Alone on the machine that is the fastest way: a
kernel's tasks start within two microseconds. Beside another busy process every yield gives that process a whole
time slice, and a network of fifty kernels becomes six to fifteen times slower than on one thread (measured; threads
bound to processors make it worse; threads that sleep instead of spinning cost half of what a second thread gains, 1.45
instead of 1.85 times). So threads are not bound, and a module that finds its threads being switched out goes on with
one thread until there is an idle processor again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["ThreadedModule", "use_threads"]

# Involuntary switches during one call that give cause to look whether other processes are at work.
CONTENDED_SWITCHES = 4
# Seconds over which other processes are watched: before giving way to them, and before coming back.
WATCH_SECONDS, COME_BACK_SECONDS = 0.05, 0.25
# Processors in use by other processes, of all that this one may use.
BUSY, FREE = 0.3, 0.15


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
        # (clock, seconds that other processes took) when watching began; None while there is no cause to.
        self._watching: tuple[float, float] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Call it."""
        if self.threads == 1:
            return self.function(*arguments)
        if self.single:
            self._watch(COME_BACK_SECONDS, lambda share: share <= FREE)
            return self.function(*arguments)
        before = _switches()
        result = self.function(*arguments)
        if _switches() - before < CONTENDED_SWITCHES:
            self._watching = None
        else:
            self._watch(WATCH_SECONDS, lambda share: share >= BUSY)
        return result

    def _watch(self, seconds: float, decides: Callable[[float], bool]) -> None:
        """Change over once the processors that others used for so long decide it."""
        now, taken = time.monotonic(), _seconds_of_others()
        if self._watching is None:
            self._watching = now, taken
            return
        since, before = self._watching
        if now - since < seconds:
            return
        self._watching = now, taken
        if decides((taken - before) / (now - since)):
            self.single, self._watching = not self.single, None
            _configure(1 if self.single else self.threads)


def _switches() -> int:
    """Times that this process's threads were made to wait for a processor."""
    try:
        import resource
    except ImportError:  # not a Unix
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _seconds_of_others() -> float:
    """Processor seconds that other processes took so far of the processors this one may use; differences mean something."""
    try:
        mine = {f"cpu{index}" for index in os.sched_getaffinity(0)}
        rows = [line.split() for line in Path("/proc/stat").read_text(encoding="ascii").splitlines()]
        # All but idle and waiting for disks; the last two columns are part of the first two.
        used = sum(sum(map(int, row[1:9])) - int(row[4]) - int(row[5]) for row in rows if row[0] in mine)
        return used / os.sysconf("SC_CLK_TCK") - time.process_time()
    except (AttributeError, OSError):
        # Not to be seen on this system: nobody is taken to be there.
        return 0.0
