"""The process that watches a search: when the searching process dies, hangs or takes too much memory, another goes on.

A fault in compiled code, a compiler that crashes and a kernel of the system that is out of memory end a process, whatever it
has caught. The study is what survives: the next process fails the trial that was under way, with the reason, tries its
configuration once more, by itself, and goes on. The watching process loads neither torch nor TVM and cannot die of either.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qsearch.errors import UsageError

__all__ = ["ProcessLimits", "Watch", "die_with_parent", "process_limits", "supervised"]

_POLL_S = 0.2
_PR_SET_PDEATHSIG = 1
# Signals that end a process for a fault of its own, or for want of memory; others are somebody's wish.
_FAULTS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGKILL)


@dataclass(frozen=True)
class ProcessLimits:
    """When a searching process is given up.

    Attributes:
        restarts: How often in a row another one may go on, without a trial that ended in between.
        trial_s: Seconds within which a trial ends, once one has begun; None for no limit.
        memory_bytes: What the process and those it has started may take together; None for no limit.
    """

    restarts: int = 3
    trial_s: float | None = None
    memory_bytes: int | None = None


def process_limits(restarts: int, trial_s: float | None, memory_gb: float | None) -> ProcessLimits:
    """Limits as a command is given them.

    Raises:
        UsageError: Nothing could be done about a process that exceeds them.
    """
    if not restarts and (trial_s or memory_gb):
        raise UsageError(
            "--trial-timeout and --max-memory-gb end a process that another one replaces: they need --restarts 1 or more"
        )
    return ProcessLimits(restarts, trial_s, None if memory_gb is None else int(1e9 * memory_gb))


class Watch:
    """What the searching process tells the one that watches it; without a watching process it tells nobody.

    Attributes:
        reason: Why the process before this one ended; None in the first.
        process: The watching process; None where there is none.
    """

    def __init__(self, shared: mmap.mmap | None = None, reason: str | None = None, process: int | None = None) -> None:
        self._shared, self.reason, self.process = shared, reason, process

    def beat(self) -> None:
        """Say that a trial has begun or ended."""
        if self._shared is not None:
            _write(self._shared, _read(self._shared)[0] + 1, time.monotonic())

    def rest(self) -> None:
        """Say that no trial is under way: what comes now may take its time."""
        if self._shared is not None:
            _write(self._shared, _read(self._shared)[0], 0.0)


def _write(shared: mmap.mmap, count: int, last: float) -> None:
    shared[:16] = struct.pack("=qd", count, last)


def _read(shared: mmap.mmap) -> tuple[int, float]:
    """Number of beats of all processes, and when this one's last was; 0 for none."""
    count, last = struct.unpack("=qd", shared[:16])
    return int(count), float(last)


def supervised(limits: ProcessLimits, say: Callable[[str], None]) -> Watch:
    """Go on in a process of its own; in this one return never, but exit as that one does.

    Args:
        limits: When it is given up.
        say: Told what happens.

    Returns:
        In the searching process alone: what it tells this one.
    """
    shared, reason, fruitless = mmap.mmap(-1, 16), None, 0
    while True:
        sys.stdout.flush()
        sys.stderr.flush()
        beats, parent = _read(shared)[0], os.getpid()
        _write(shared, beats, 0.0)
        child = os.fork()
        if child == 0:
            # Ctrl-C reaches the watching process alone, which passes it on: once, whoever sends it.
            os.setpgid(0, 0)
            _end_with(parent)
            return Watch(shared, reason, parent)
        status, reason = _watched(child, shared, limits)
        if reason is None:
            _exit_like(status)
        # A trial begins and ends: two beats.
        fruitless = 1 if _read(shared)[0] >= beats + 2 else fruitless + 1
        if fruitless > limits.restarts:
            say(f"error: {reason}; {fruitless} times in a row, so the search has stopped: every finished trial is kept")
            raise SystemExit(1)
        say(f"{reason}; another process goes on")


def _watched(child: int, shared: mmap.mmap, limits: ProcessLimits) -> tuple[int, str | None]:
    """Wait for a process, and end it where it exceeds a limit.

    Returns:
        Its wait status, and why it died; None where it ended by itself, or because somebody wished it to.
    """

    def pass_on(number: int, _: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    before = signal.signal(signal.SIGINT, pass_on)
    reason = None
    try:
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            reason = reason or _excess(child, shared, limits)
            if reason is not None:
                for process in _family(child):
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
            time.sleep(_POLL_S)
    finally:
        signal.signal(signal.SIGINT, before)
    if reason is None and os.WIFSIGNALED(status) and os.WTERMSIG(status) in _FAULTS:
        name = signal.Signals(os.WTERMSIG(status)).name
        for_want = ", perhaps for want of memory" if name == "SIGKILL" else ""
        reason = f"the searching process died of {name}{for_want}"
    return status, reason


def _excess(child: int, shared: mmap.mmap, limits: ProcessLimits) -> str | None:
    _, last = _read(shared)
    if limits.trial_s is not None and last and time.monotonic() - last > limits.trial_s:
        return f"no trial has ended within {limits.trial_s:g} s"
    if limits.memory_bytes is not None:
        taken = sum(_resident(process) for process in _family(child))
        if taken > limits.memory_bytes:
            return f"the search took {taken / 1e9:.1f} GB of memory, more than the {limits.memory_bytes / 1e9:g} allowed"
    return None


def _family(process: int) -> list[int]:
    """A process and all that descend from it, as far as the system tells."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(entry.name))
    found = [process]
    for one in found:
        found += parents.get(one, [])
    return found


def _resident(process: int) -> int:
    """Bytes of memory that are a process's own: resident, less what is shared."""
    with suppress(OSError, ValueError, IndexError):
        _, resident, shared, *_ = Path(f"/proc/{process}/statm").read_text().split()
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
    return 0


def die_with_parent() -> None:
    """Have the system kill this process when the thread that started it ends, where it has a signal for that."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with(parent: int) -> None:
    """End this process with its parent, however that ends."""
    die_with_parent()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_S)
        os._exit(1)

    # Where the system has no such signal, and for a parent that was gone before it was asked for.
    threading.Thread(target=look, daemon=True).start()


def _exit_like(status: int) -> None:
    """End this process as another one has ended."""
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    raise SystemExit(os.waitstatus_to_exitcode(status))
