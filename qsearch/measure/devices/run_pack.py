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

__all__ = ["measure_pack_file"]

TIMEOUT_S = 3600


def measure_pack_file(pack: Path, out: Path) -> dict[str, Any]:
    """Check and time every kernel of a pack, and write the cost table.

    This package's own runner does it, never the pack's copy: a changed pack must not run code of its own before its
    checksums were looked at.

    Args:
        pack: The pack.
        out: Where the cost table is written.

    Returns:
        device, kernels, wrong (how many), problems: symbol -> what is wrong.

    Raises:
        UsageError: The device is not here, or the pack is for another machine or version.
        MeasureError: The pack is damaged, or the process failed.
    """
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
        raise (UsageError if done.returncode == pack_runner.ELSEWHERE else MeasureError)(result["problem"])
    return result
