"""A process that lowers and links beside the one that measures."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol

from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.backend.resource_tracker import ensure_running

from qsearch.config import QuantConfig

__all__ = ["Packer", "Worker"]

# How long a worker may outlive a killed parent, seconds.
ORPHAN_S = 0.5
# How far a worker gives way to the driver, which runs on the same processors.
NICENESS = 5


class Packer(Protocol):
    """What a worker is sent once, pickled."""

    def pack(self, config: QuantConfig) -> Any:
        """Build a configuration; the answer is pickled, and so is a TrialError."""
        ...


class Worker:
    """One process that packs configurations, in the order in which they come.

    It is started with the first of them, takes its place on the processors of the thread that starts it, hears no
    Ctrl-C, and ends with its parent however that ends. One that has died is replaced when it is next needed.

    Args:
        packer: What does the work.
    """

    def __init__(self, packer: Packer) -> None:
        self._packer = packer
        self._executor: ProcessPoolExecutor | None = None
        self._closed = False
        self._starting = threading.Lock()

    def submit(self, config: QuantConfig) -> Future[Any]:
        """Pack a configuration.

        Returns:
            The answer to be; a BrokenProcessPool if the process dies at it.
        """
        with self._starting, _interrupt_blocked():
            if self._closed:
                raise RuntimeError("the worker is closed")
            if self._executor is not None:
                try:
                    return self._executor.submit(_pack, config)
                except BrokenProcessPool:
                    self._executor.shutdown(wait=True, kill_workers=True)
            self._executor = ProcessPoolExecutor(1, initializer=_begin, initargs=(self._packer, os.getpid()))
            return self._executor.submit(_pack, config)

    def close(self) -> None:
        """End the process, whatever it is at."""
        with self._starting:
            self._closed = True
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


_packer: Packer | None = None


def _begin(packer: Packer, parent: int) -> None:
    """Make this process a worker."""
    global _packer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A driver that waits for the processor while it holds Python's lock holds up the timing in its own process.
    os.nice(NICENESS)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _packer = packer


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(ORPHAN_S)
    os._exit(1)


def _pack(config: QuantConfig) -> Any:
    assert _packer is not None
    return _packer.pack(config)
