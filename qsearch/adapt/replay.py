"""Run a bundle's module with other scales, in a fresh process that loads nothing but NumPy and TVM's runtime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qsearch.adapt.propose import Scales
from qsearch.errors import BundleError, TargetMismatchError
from qsearch.export import monitor, rescale, runner
from qsearch.export.scales_record import lookup_tables

__all__ = ["Modules", "rescaled_module"]

TIMEOUT_S = 1800


def rescaled_module(bundle: Path, record: dict[str, Any], scales: Scales) -> bytes:
    """A bundle's module with other scales.

    Raises:
        BundleError: It cannot have them.
    """
    module = (bundle / "model.so").read_bytes()
    try:
        return rescale.with_scales(record, module, scales, lookup_tables(record, scales))
    except rescale.ScaleProblem as problem:
        raise BundleError(f"{bundle}: {problem}") from None


@dataclass(frozen=True)
class Modules:
    """Modules of one bundle under various scales.

    Attributes:
        bundle: The bundle.
        manifest: Its manifest.
        record: Its scales.
    """

    bundle: Path
    manifest: dict[str, Any]
    record: dict[str, Any]

    def recorded_inputs(self) -> np.ndarray:
        """The inputs whose outputs the bundle records, as the module takes them."""
        return np.asarray(runner.recorded_inputs(self.bundle, self.manifest))

    def outputs(self, wanted: Sequence[Scales | None], images: np.ndarray) -> np.ndarray:
        """What modules give for images.

        Args:
            wanted: Scales of each; None for those that the bundle has.
            images: As the module takes them.

        Returns:
            (modules, N, ...).

        Raises:
            BundleError: They cannot be run.
        """
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name)
            given, found, files = scratch / "images.npy", scratch / "outputs.npy", []
            np.save(given, images, allow_pickle=False)
            for number, scales in enumerate(wanted):
                file = scratch / f"{number}.so"
                if scales is not None:
                    file.write_bytes(rescaled_module(self.bundle, self.record, scales))
                files.append(self.bundle / "model.so" if scales is None else file)
            self._run("outputs", self.bundle, given, found, *files)
            return np.asarray(np.load(found, allow_pickle=False))

    def _run(self, *arguments: str | Path) -> None:
        """Run this package's own monitor, never the bundle's copy: a changed bundle must not run code of its own."""
        environment = os.environ | {"TVM_USE_RUNTIME_LIB": "1"}
        command = [sys.executable, monitor.__file__, *map(str, arguments)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=False)
        except subprocess.TimeoutExpired as error:
            raise BundleError(f"modules of {self.bundle} did not finish within {TIMEOUT_S} s") from error
        try:
            result = json.loads(done.stdout.strip().splitlines()[-1])
        except (IndexError, ValueError):
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise BundleError(f"modules of {self.bundle} cannot be run: {reason}") from None
        if "problem" in result:
            kind = TargetMismatchError if done.returncode == runner.WRONG_MACHINE else BundleError
            raise kind(result["problem"])
