"""The process that measures beside the one that searches: what it times shares Python's lock with nothing."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.backend.reduction import dumps
from joblib.externals.loky.backend.resource_tracker import ensure_running

if TYPE_CHECKING:
    # A process that begins looks after its parent as soon as it has this module: what measures is imported after it.
    from qsearch.measure.measurement import Measurement
    from qsearch.search.loop.early_stopping import StoppingRule

__all__ = ["Measure", "Worker"]

# How long a worker may outlive a killed parent, seconds.
ORPHAN_S = 0.5

# Measures what was packed for it; a TrialError or an EarlyStop is pickled as well.
Measure = Callable[[Any, "StoppingRule | None"], "Measurement"]


class Worker:
    """One process that measures, one thing after the other; being one, it is the lock of what it times on.

    It hears no Ctrl-C, and ends with its parent however that ends. One that has died is replaced when it is next needed.

    Args:
        open_device: What the process is sent once, pickled: gets ready and answers with what measures.
    """

    def __init__(self, open_device: Callable[[], Measure]) -> None:
        self._open_device = open_device
        self._executor: ProcessPoolExecutor | None = None
        self._opened: Future[None] | None = None

    def start(self) -> None:
        """Start the process; it gets ready by itself."""
        with _interrupt_blocked():
            self._executor = ProcessPoolExecutor(1, initializer=_begin, initargs=(bytes(dumps(self._open_device)), os.getpid()))
            # Whatever goes wrong here goes wrong again, and is said, at the first thing to measure.
            self._opened = self._executor.submit(_device)

    def settle(self) -> None:
        """Wait until the process has got ready, or has failed to; from then on it only works when it measures."""
        if self._opened is not None:
            wait([self._opened])

    def measure(self, packed: Any, rule: StoppingRule | None) -> Future[Measurement]:
        """Measure a packed configuration.

        Returns:
            The measurement to be, or what measuring raises; a BrokenProcessPool if the process dies of it.
        """
        if self._executor is not None:
            try:
                return self._executor.submit(_measure, packed, rule)
            except BrokenProcessPool:
                self.close()
        self.start()
        assert self._executor is not None
        return self._executor.submit(_measure, packed, rule)

    def close(self) -> None:
        """End the process, whatever it is at."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, kill_workers=True)


@contextmanager
def _interrupt_blocked() -> Iterator[None]:
    """Keep Ctrl-C from the processes that the block starts: they inherit what is blocked. Nothing is lost of it here."""
    # Whoever starts the tracker has SIGINT unblocked by it.
    ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_pickled: list[bytes] = []
_opened: list[Measure] = []


def _begin(open_device: bytes, parent: int) -> None:
    """Make this process a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _pickled.append(open_device)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(ORPHAN_S)
    os._exit(1)


def _device() -> None:
    if not _opened:
        _opened.append(pickle.loads(_pickled[0])())


def _measure(packed: Any, rule: StoppingRule | None) -> Measurement:
    _device()
    return _opened[0](packed, rule)
