"""The path that every search takes: Python, TVM, a compiler, a kernel that is compiled, linked and run, disk, processors."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import numpy as np

from qsearch.build.cache import KernelCache
from qsearch.build.link import Linker
from qsearch.build.target import Target, require_runnable
from qsearch.measure.devices.pack import CHAIN_SHAPE, chain_program
from qsearch.measure.doctor.check import Check, attempted
from qsearch.measure.processors import available_processors

__all__ = ["check_compiler", "check_host", "check_package", "check_room"]

PINNED = ("apache-tvm", "apache-tvm-ffi", "torch", "torchvision")
LEAST_PYTHON = (3, 11)
# What a search of a large model writes: kernels, decoded images, the study.
ROOM_BYTES = 1_000_000_000


def check_host(target: Target, cache: Path) -> list[Check]:
    """Look at everything that a search on this machine needs.

    Args:
        target: What is compiled for; the test kernel is run only if this machine can run it.
        cache: Where kernels are kept.
    """
    python = platform.python_version()
    wanted = ".".join(map(str, LEAST_PYTHON))
    old = sys.version_info < LEAST_PYTHON
    found = [Check("Python", "problem" if old else "ok", python, f"install Python {wanted} or newer" if old else "")]
    found += [check_package(name, _pin(name)) for name in PINNED]
    found.append(check_compiler())
    found.append(attempted("test kernel", "see the compiler and the versions above", lambda: _test_kernel(target)))
    found.append(check_room(cache))
    count = len(available_processors())
    few = "give the process a second one (taskset, cgroup): a search then builds a trial while it measures another"
    found.append(Check("processors", "ok", f"{count} may be used", few if count == 1 else ""))
    return found


def check_package(name: str, pin: str | None) -> Check:
    """A package's version against the one that qsearch was tested with.

    Args:
        name: The package.
        pin: The version; None where any will do.
    """
    remedy = f"pip install '{name}{f'=={pin}' if pin else ''}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Check(name, "problem", "not installed", remedy)
    # A build of a version, such as 2.13.0+cpu, is that version.
    if pin is not None and found.partition("+")[0] != pin:
        return Check(name, "problem", f"{found}, expected {pin}", remedy)
    return Check(name, "ok", found)


def _pin(name: str) -> str | None:
    try:
        wanted = requires("qsearch") or []
    except PackageNotFoundError:
        return None
    matches = (re.match(rf"{re.escape(name)}==([\w.]+)", one) for one in wanted)
    return next((match.group(1) for match in matches if match), None)


def check_compiler() -> Check:
    """The C++ compiler that links kernels."""
    from tvm.support import cc

    remedy = "install g++ or clang++, or set CXX to one"
    compiler = cc.get_cc()
    if not compiler:
        return Check("C++ compiler", "problem", "none found", remedy)

    def asked() -> str:
        done = subprocess.run([str(compiler), "--version"], capture_output=True, text=True, timeout=30, check=True)
        return f"{compiler}: {done.stdout.splitlines()[0]}"

    return attempted("C++ compiler", remedy, asked)


def _test_kernel(target: Target) -> str:
    """Compile, link and run a kernel that copies."""
    import tvm

    require_runnable(target)
    with tempfile.TemporaryDirectory() as name:
        module = Linker(KernelCache(Path(name), target)).build(chain_program(2))
        given = np.arange(np.prod(CHAIN_SHAPE), dtype=np.float32).reshape(CHAIN_SHAPE)
        found = module.open()["main"](tvm.runtime.tensor(given)).numpy()
    if not np.array_equal(found, given):
        raise ValueError("it gave other values than it should")
    return f"compiled, linked and run for {target.description}"


def check_room(cache: Path) -> Check:
    """Space on the disk of the kernel cache."""
    nearest = next(parent for parent in (cache.resolve(), *cache.resolve().parents) if parent.exists())
    free = shutil.disk_usage(nearest).free
    text = f"{free / 1e9:.1f} GB free in {nearest}"
    if free >= ROOM_BYTES:
        return Check("disk", "ok", text)
    return Check("disk", "problem", text, f"free some space: a search of a large model may need {ROOM_BYTES / 1e9:.0f} GB")
