"""Measure a pack in a fresh process that loads nothing but NumPy and TVM's runtime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from qsearch.errors import MeasureError, UsageError
from qsearch.measure.devices import pack_runner
from qsearch.seal import require_own

__all__ = ["measure_pack_file", "require_own_pack"]

TIMEOUT_S = 3600


def measure_pack_file(pack: Path, out: Path, trust: bool = False) -> dict[str, Any]:
    """Check and time every kernel of a pack, and write the cost table.

    This package's own runner does it, never the pack's copy: a changed pack must not run code of its own before its
    checksums were looked at.

    Args:
        pack: The pack.
        out: Where the cost table is written.
        trust: Whether a pack that this user has not made may be run.

    Returns:
        device, kernels, wrong (how many), problems: symbol -> what is wrong.

    Raises:
        UsageError: The device is not here, or the pack is for another machine or version.
        MeasureError: The pack is damaged, or the process failed.
        UntrustedError: The pack is somebody else's.
    """
    require_own_pack(pack, trust)
    command = [sys.executable, "-I", str(Path(pack_runner.__file__)), str(pack), "--out", str(out)]
    environment = os.environ | {"TVM_USE_RUNTIME_LIB": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=False)
    except subprocess.TimeoutExpired as error:
        raise MeasureError(f"{pack} was not measured within {TIMEOUT_S} s: the device does not answer any more") from error
    try:
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise MeasureError(f"{pack} cannot be measured: {lines[-1]}") from None
    if "problem" in result:
        raise _error(result["problem"], done.returncode)
    return result


def require_own_pack(pack: Path, trust: bool) -> None:
    """Check a pack's files, and refuse one that this user has not made.

    Args:
        pack: The pack.
        trust: Take it all the same.

    Raises:
        UntrustedError: It is somebody else's.
        UsageError: It is for another version.
        MeasureError: It is damaged, or none.
    """
    try:
        with pack_runner.open_archive(pack) as archive:
            digest = pack_runner.own_digest(pack_runner.read_manifest(archive))
            seal = archive.comment.decode("ascii", "replace")
    except pack_runner.PackProblem as problem:
        raise _error(str(problem), problem.status) from None
    require_own(str(pack), pack_runner.KIND, digest, seal, trust)


def _error(problem: str, status: int) -> Exception:
    return (UsageError if status == pack_runner.ELSEWHERE else MeasureError)(problem)
