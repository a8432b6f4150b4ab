"""This machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qsearch.measure.devices.device import Prepared
from qsearch.measure.latency import TimingSettings, measure_latency, measure_paired
from qsearch.measure.measurement import Latency

__all__ = ["LocalDevice"]


@dataclass(frozen=True)
class LocalDevice:
    """This machine; a handle is a virtual machine.

    Attributes:
        threads: Threads that modules were compiled for.
    """

    threads: int = 1

    def handle(self, prepared: Prepared) -> Any:
        """A virtual machine of its own."""
        return prepared.open()

    def alone(self, handle: Any, image: np.ndarray, settings: TimingSettings) -> Latency:
        """See `measure_latency`."""
        return measure_latency(handle, image, settings, self.threads)

    def paired(self, reference: Any, handles: Sequence[Any], image: np.ndarray, reference_ms: float) -> list[Latency]:
        """See `measure_paired`."""
        return measure_paired(reference, handles, image, reference_ms, threads=self.threads)
