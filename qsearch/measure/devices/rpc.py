"""A device reached through TVM's RPC tracker: modules are exported, sent there and timed there."""

from __future__ import annotations

import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from qsearch.errors import MeasureError, UsageError
from qsearch.measure.devices.device import Prepared
from qsearch.measure.latency import TimingSettings, measure_latency, measure_paired
from qsearch.measure.measurement import Latency

__all__ = ["RemoteMachine", "RpcAddress", "RpcDevice", "parse_address"]

CONNECT_S = 5.0
# A device that has not answered by then is given up, and the trial with it. Others may be using it before.
ANSWER_S, FREE_S = 60.0, 120.0
POLL_S = 1.0
ATTEMPTS = 2

T = TypeVar("T")
# A library must not be replaced while it is loaded: names are used once.
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class RpcAddress:
    """Where a tracker is, and the key of the devices that are wanted of it."""

    host: str
    port: int
    key: str

    @property
    def shown(self) -> str:
        """For messages."""
        return f"{self.host}:{self.port}"


def parse_address(tracker: str, key: str | None) -> RpcAddress:
    """Read HOST:PORT and a key.

    Raises:
        UsageError: They are none.
    """
    host, _, port = tracker.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"--rpc: expected HOST:PORT of a tracker, such as 192.168.0.2:9190, got {tracker!r}")
    if not key:
        raise UsageError("--rpc needs --key: the key under which the device's rpc_server has registered")
    return RpcAddress(host, int(port), key)


class RemoteMachine:
    """A virtual machine elsewhere, which times as one here does."""

    # Nothing of it runs in the calling thread: its own clock is the only one that counts.
    on_cpu = False

    def __init__(self, machine: Any, device: Any) -> None:
        self.machine, self.device, self.place = machine, device, device
        self._given: Any = None

    def tensor(self, array: np.ndarray) -> Any:
        """An argument for it; it stays here until it is asked for."""
        import tvm

        return tvm.runtime.tensor(np.ascontiguousarray(array))

    def time_evaluator(self, name: str, device: Any, number: int, repeat: int) -> Callable[[Any], Any]:
        """TVM's evaluator, on the machine's own device.

        The argument is set there once: what a call itself brings over RPC is a tensor that views cannot be made of.
        """
        import tvm

        evaluator = self.machine.time_evaluator("invoke_stateful", self.device, number=number, repeat=repeat)

        def timed(given: Any) -> Any:
            if self._given is not given:
                self.machine.set_input(name, tvm.runtime.tensor(given.numpy(), self.device))
                self._given = given
            return evaluator(name)

        return timed


@dataclass(frozen=True)
class RpcDevice:
    """Devices under one key of a tracker; a handle is the file of an exported module.

    A session is asked for anew for every measurement: between two, others may have the device, and one that went away is
    replaced by the next that has its key. Where a tracker has several devices, so many may be in use at a time.

    Attributes:
        address: Of the tracker.
        kind: 'cpu' or 'cuda'.
        threads: Threads that modules were compiled for.
        answer_s: Seconds that a measurement may take.
        free_s: Seconds that a device is waited for: others may have it, or it may come back.
    """

    address: RpcAddress
    kind: str = "cpu"
    threads: int = 1
    answer_s: float = ANSWER_S
    free_s: float = FREE_S

    def handle(self, prepared: Prepared) -> Any:
        """Its file."""
        return prepared.away

    def alone(self, handle: Any, image: np.ndarray, settings: TimingSettings) -> Latency:
        """Time one module."""
        return self._timed([handle], lambda machines: [measure_latency(machines[0], image, settings, self.threads)])[0]

    def paired(self, reference: Any, handles: Sequence[Any], image: np.ndarray, reference_ms: float) -> list[Latency]:
        """Time modules in turns with a reference, by the device's clock."""

        def time_them(machines: Sequence[Any]) -> list[Latency]:
            return measure_paired(machines[0], machines[1:], image, reference_ms, threads=self.threads)

        return self._timed([reference, *handles], time_them)

    def _timed(self, handles: Sequence[Any], measure: Callable[[Sequence[Any]], list[Latency]]) -> list[Latency]:
        def run(session: Any) -> list[Latency]:
            from tvm import relax

            device, libraries = session.device(self.kind, 0), [send(session, one.path) for one in handles]
            machines = [RemoteMachine(relax.VirtualMachine(one, device), device) for one in libraries]
            try:
                return measure(machines)
            finally:
                # In this order: a server dies of what outlives the library that it came from.
                machines.clear()
                libraries.clear()

        return self.session(run)

    def session(self, run: Callable[[Any], T]) -> T:
        """Run something with a session of a device; where it fails once more, as the device may have gone away meanwhile.

        Raises:
            MeasureError: No device is to be had, two failed, or one did not answer in time.
        """
        where = f"the device under key {self.address.key!r} of the tracker {self.address.shown}"

        def connected() -> T:
            # The session ends, and its device is free again, when nothing refers to it any more.
            return run(self._request())

        for attempt in range(ATTEMPTS):
            try:
                return within(connected, self.free_s + self.answer_s, where)
            except (RuntimeError, OSError, ValueError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                failure = MeasureError(f"{where} failed {attempt + 1} times: {reason[:300]}; see what its rpc_server says")
                failure.__cause__ = error
        raise failure

    def require(self) -> None:
        """Refuse a tracker that is not there, or that knows no device under the key.

        Raises:
            UsageError: As said.
        """
        try:
            within(self._tracker, ANSWER_S, f"the RPC tracker {self.address.shown}")
        except MeasureError as error:
            raise UsageError(str(error)) from error

    def _request(self) -> Any:
        """A session, once a device is free."""
        deadline = time.monotonic() + self.free_s
        while True:
            reason: Exception = MeasureError(f"no device under key {self.address.key!r} became free within {self.free_s:.0f} s")
            try:
                tracker = self._tracker()
                if free_devices(tracker.summary(), self.address.key):
                    return tracker.request(self.address.key, session_timeout=self.answer_s, max_retry=1)
            except (MeasureError, RuntimeError, OSError, ValueError) as error:
                reason = error
            if time.monotonic() > deadline:
                raise reason
            time.sleep(POLL_S)

    def _tracker(self) -> Any:
        """The tracker, which has a device of the key.

        Raises:
            MeasureError: It is not there, or has none.
        """
        address = self.address
        try:
            tracker = open_tracker(address)
            keys = registered_keys(tracker.summary())
        except (RuntimeError, OSError, ValueError) as error:
            raise MeasureError(
                f"no RPC tracker answers at {address.shown} ({error}): start one with python -m tvm.exec.rpc_tracker --host "
                f"0.0.0.0 --port {address.port}, and on the device python -m tvm.exec.rpc_server --tracker HOST:{address.port} "
                f"--key {address.key}"
            ) from error
        if address.key not in keys:
            raise MeasureError(
                f"the RPC tracker at {address.shown} knows no device under key {address.key!r}; it has: "
                f"{', '.join(sorted(keys)) or 'none'}. Start one: python -m tvm.exec.rpc_server --tracker HOST:{address.port} "
                f"--key {address.key}"
            )
        return tracker


def open_tracker(address: RpcAddress) -> Any:
    """TVM's client of a tracker, which tries once and does not wait for ever.

    Raises:
        OSError, RuntimeError: There is no tracker.
    """
    from tvm.rpc import base
    from tvm.rpc.client import TrackerSession

    class Tracker(TrackerSession):
        def _connect(self) -> None:
            self._sock = socket.create_connection(self._addr, CONNECT_S)
            self._sock.settimeout(ANSWER_S)
            self._sock.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
            if struct.unpack("<i", base.recvall(self._sock, 4))[0] != base.RPC_TRACKER_MAGIC:
                raise RuntimeError(f"what listens at {address.shown} is no RPC tracker")

    return Tracker((address.host, address.port))


def registered_keys(summary: dict[str, Any]) -> set[str]:
    """Keys that some server has registered under."""
    return {str(server["key"]).removeprefix("server:") for server in summary.get("server_info", [])}


def free_devices(summary: dict[str, Any], key: str) -> int:
    """How many devices of a key wait to be asked for."""
    free = summary.get("queue_info", {}).get(key, {}).get("free", 0)
    return free if isinstance(free, int) else len(free)


def send(session: Any, file: Path) -> Any:
    """Send a library and load it there."""
    name = f"{next(_NUMBERS)}-{file.name}"
    session.upload(str(file), target=name)
    return session.load_module(name)


def within(run: Callable[[], T], seconds: float, where: str) -> T:
    """Run something in a thread that is given up when it takes longer.

    Raises:
        MeasureError: It did; whatever else it raises.
    """
    found: list[T] = []
    failed: list[BaseException] = []

    def target() -> None:
        try:
            found.append(run())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not found:
        raise MeasureError(f"{where} has not answered for {seconds:.0f} s")
    return found[0]
