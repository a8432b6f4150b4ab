"""TVM's RPC tracker and servers on this machine, as processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from qsearch.errors import UsageError
from qsearch.measure.devices.rpc import RpcAddress, free_devices, open_tracker

KEY = "small-device"
PATIENCE_S = 120.0


@contextmanager
def running(*arguments: str) -> Iterator[None]:
    """One of TVM's programs, ended with the block."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # A session of its own, as it may start processes that outlive it.
    process = subprocess.Popen([sys.executable, "-m", *arguments], start_new_session=True, **quiet)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def tracker() -> Iterator[RpcAddress]:
    """A tracker without devices."""
    found = RpcAddress("127.0.0.1", free_port(), KEY)
    place = ("--host", found.host, "--port", str(found.port), "--port-end", str(found.port + 1))
    with running("tvm.exec.rpc_tracker", *place):
        wait_for(lambda: socket.create_connection((found.host, found.port), 1.0).close())
        yield found


@contextmanager
def devices(address: RpcAddress, more: int, count: int) -> Iterator[None]:
    """More devices of a tracker.

    Args:
        address: Of the tracker.
        more: So many.
        count: How many are free then.
    """
    server = ("tvm.exec.rpc_server", "--host", address.host, "--tracker", address.shown, "--key", address.key)
    with ExitStack() as undo:
        for _ in range(more):
            undo.enter_context(running(*server))
        wait_for(lambda: _require_free(address, count))
        yield


def wait_for(there: Callable[[], None]) -> None:
    """Until something stops failing."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return there()
        except (OSError, UsageError):
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _require_free(address: RpcAddress, count: int) -> None:
    if free_devices(open_tracker(address).summary(), address.key) != count:
        raise UsageError("not yet")
