"""Measurements by configuration, kept in a folder: what was measured once is not measured again, by any process."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qsearch.config import QuantConfig
from qsearch.measure.measurement import Measurement
from qsearch.search.front import measurement_from_json

__all__ = ["Measured", "MeasuredFolder", "cpu_seconds", "read_lines"]


@dataclass(frozen=True)
class Measured:
    """One configuration's measurement.

    Attributes:
        config: What was measured.
        measurement: On all search images.
        cpu_s: Processor seconds that it took; a busy machine or a stopped process does not add to them.
        right: bool (N,), which search images the module had right; None where that was not recorded.
    """

    config: QuantConfig
    measurement: Measurement
    cpu_s: float
    right: np.ndarray | None = None

    @property
    def objectives(self) -> tuple[float, float, float]:
        """latency_ms, peak_bytes, top1_loss_pp."""
        found = self.measurement
        return (found.latency.median_ms, float(found.memory.peak_bytes), found.accuracy.top1_loss_pp)

    def to_json(self) -> dict[str, Any]:
        """Plain types; the images as one bit each."""
        data = {"config": self.config.to_json(), "measurement": self.measurement.to_json(), "cpu_s": self.cpu_s}
        if self.right is not None:
            data |= {"images": len(self.right), "right": base64.b64encode(np.packbits(self.right).tobytes()).decode()}
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Measured:
        """The inverse of `to_json`."""
        right = None
        if "right" in data:
            bits = np.frombuffer(base64.b64decode(data["right"]), np.uint8)
            right = np.unpackbits(bits, count=data["images"]).astype(bool)
        config = QuantConfig.model_validate(data["config"])
        return cls(config, measurement_from_json(data["measurement"]), data["cpu_s"], right)


class MeasuredFolder:
    """The measurements of one problem: a file of lines per process, so that several can measure at once.

    Args:
        path: The folder.
        measure: Measures a configuration: its measurement, and which images it had right if that is known.
    """

    def __init__(self, path: Path, measure: Callable[[QuantConfig], tuple[Measurement, np.ndarray | None]]) -> None:
        self.path, self.measure = path, measure
        path.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, Measured] = {}
        # Of the process and of its start: process numbers are used again.
        self.file = path / f"{time.time_ns():x}-{os.getpid()}.jsonl"
        self.refresh()

    def refresh(self) -> None:
        """Read what other processes have measured."""
        for file in sorted(self.path.glob("*.jsonl")):
            for line in read_lines(file):
                self._keep(Measured.from_json(line))

    def evaluate(self, config: QuantConfig) -> Measured:
        """What is known of a configuration, measuring it if that is nothing."""
        found = self.known.get(config.content_hash())
        return self.remeasure(config) if found is None else found

    def remeasure(self, config: QuantConfig) -> Measured:
        """Measure a configuration, and keep that unless its timing is noisy and what was known is not."""
        start = cpu_seconds()
        measurement, right = self.measure(config)
        found = Measured(config, measurement, cpu_seconds() - start, right)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(found.to_json()) + "\n")
        self._keep(found)
        return self.known[config.content_hash()]

    def _keep(self, found: Measured) -> None:
        """Of several measurements of one configuration the first that is not noisy counts, whichever process reads them."""
        digest = found.config.content_hash()
        before = self.known.get(digest)
        if before is None or (before.measurement.latency.noisy and not found.measurement.latency.noisy):
            self.known[digest] = found


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; a line that a killed process left unfinished is passed over."""
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict):
            yield found


def cpu_seconds() -> float:
    """Processor seconds of this process and of the linkers and compilers it has waited for."""
    return time.process_time() + sum(os.times()[2:4])
