"""Get modules ready for a device that is reached over RPC."""

from __future__ import annotations

import itertools
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from qsearch.build.link import Linker
from qsearch.build.object_cache import cache_for, compiler_for, link_for
from qsearch.build.target import Target
from qsearch.errors import BuildError
from qsearch.measure.devices.kernel_cases import KernelCase, kernel_cases
from qsearch.measure.devices.pack import target_json
from qsearch.measure.devices.pack_runner import Bench
from qsearch.measure.devices.rpc import RpcAddress, RpcDevice, send
from qsearch.quantize.program import Program

__all__ = ["RemoteLibrary", "RpcAway"]


class RemoteLibrary:
    """A module's library to be sent; its file goes with it. Pickled it is the file's content: who times it may be elsewhere."""

    def __init__(self, path: Path) -> None:
        self.path = path
        weakref.finalize(self, path.unlink, missing_ok=True)

    def __reduce__(self) -> tuple[Callable[[bytes], RemoteLibrary], tuple[bytes]]:
        return _arrived, (self.path.read_bytes(),)


def _arrived(content: bytes) -> RemoteLibrary:
    descriptor, name = tempfile.mkstemp(prefix="qsearch-rpc-", suffix=".so")
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
    return RemoteLibrary(Path(name))


class RpcAway:
    """A target whose modules are timed on a device that is reached over RPC.

    Args:
        address: The tracker and the device's key.
        target: What is compiled for.
        folder: Where kernels are kept.
    """

    def __init__(self, address: RpcAddress, target: Target, folder: Path) -> None:
        self.target, self.linker = target, Linker(cache_for(folder, target))
        self.device = RpcDevice(address, target_json(target)["device"], target.threads)
        self.description = f"the RPC device {address.key!r}"
        self._scratch = tempfile.TemporaryDirectory(prefix="qsearch-rpc-")
        self._numbers = itertools.count()
        self._times: dict[str, float] = {}

    def require(self, program: Program) -> None:
        """Refuse to begin where there is no tracker or no such device.

        Raises:
            UsageError: There is none.
        """
        self.device.require()

    def prepare(self, program: Program) -> RemoteLibrary:
        """The program's module as one library.

        Raises:
            BuildError: It cannot be built or linked.
        """
        module = self.linker.build(program, linked=False, exported=True)
        path = Path(self._scratch.name) / f"module{next(self._numbers)}.so"
        try:
            module.executable.export_library(str(path), addons=module.addons, cc=compiler_for(self.target))
        except RuntimeError as error:
            raise BuildError(f"linking a module for the device failed: {str(error).strip().splitlines()[-1]}") from error
        return RemoteLibrary(path)

    def seconds(self, symbol: str) -> float | None:
        """As `learn` has measured it."""
        return self._times.get(symbol)

    def learn(self, programs: Iterable[Program]) -> None:
        """Check and time the kernels of some programs there, as a pack would; those that are wrong get no time.

        Raises:
            MeasureError: The device fails.
        """
        cases = [case for case in kernel_cases(self.linker, programs) if case.symbol not in self._times]
        if not cases:
            return
        compiled = self.linker.cache.get((case.symbol, case.kernel) for case in cases)
        path = Path(self._scratch.name) / f"kernels{next(self._numbers)}.so"
        link_for(self.target, path, [compiled[case.symbol] for case in cases])
        self._times |= self.device.session(lambda session: self._measured(session, path, cases))

    def _measured(self, session: Any, path: Path, cases: list[KernelCase]) -> dict[str, float]:
        import tvm

        library, found = send(session, path), {}
        bench = Bench(tvm, session.device(self.device.kind, 0), None, self.target.threads)
        for case in cases:
            seconds = _seconds(bench, library, case)
            if seconds is not None:
                found[case.symbol] = seconds
        return found


def _seconds(bench: Bench, library: Any, case: KernelCase) -> float | None:
    """Seconds of a kernel; None where it is wrong. Whatever of the library was used is let go of."""
    arguments = [bench.tensor(one) for one in case.arguments]
    if bench.check(library[case.symbol], case.expected, case.tolerance, arguments) is not None:
        return None
    return float(bench.time(library, case.symbol, [*arguments, bench.tensor(case.expected)])["seconds"])
