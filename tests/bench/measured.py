"""Measurements by configuration, kept in a folder: what was measured once is not measured again, by any process."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qsearch.config import QuantConfig
from qsearch.measure.latency import middle_of
from qsearch.measure.measurement import Latency, Measurement
from qsearch.search.front import measurement_from_json

__all__ = ["Answers", "Measured", "MeasuredFolder", "Source", "cpu_seconds", "read_lines"]


@dataclass(frozen=True)
class Answers:
    """What a module answered for each search image.

    Attributes:
        right: bool (N,), whether its best class is the label.
        nats: float32 (N,), Kullback-Leibler divergence of its probabilities from float's.
    """

    right: np.ndarray
    nats: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Plain types: a bit and four bytes for each image."""
        packed, nats = np.packbits(self.right).tobytes(), self.nats.astype("<f4").tobytes()
        return {"images": len(self.right), "right": base64.b64encode(packed).decode(), "nats": base64.b64encode(nats).decode()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Answers:
        """The inverse of `to_json`."""
        bits = np.unpackbits(np.frombuffer(base64.b64decode(data["right"]), np.uint8), count=data["images"])
        return cls(bits.astype(bool), np.frombuffer(base64.b64decode(data["nats"]), "<f4"))


class Source(Protocol):
    """What measures."""

    def measure(self, config: QuantConfig) -> tuple[Measurement, Answers | None]:
        """A configuration's measurement, and what it answered for each search image, where that is known."""
        ...

    def time(self, config: QuantConfig) -> Latency:
        """Its latency alone."""
        ...


@dataclass(frozen=True)
class Measured:
    """One configuration's measurement.

    Attributes:
        config: What was measured.
        measurement: On all search images.
        cpu_s: Processor seconds that it took; a busy machine or a stopped process does not add to them.
        answers: For the search images; None where they were not recorded.
    """

    config: QuantConfig
    measurement: Measurement
    cpu_s: float
    answers: Answers | None = None

    @property
    def objectives(self) -> tuple[float, float, float]:
        """latency_ms, peak_bytes, top1_loss_pp."""
        found = self.measurement
        return (found.latency.median_ms, float(found.memory.peak_bytes), found.accuracy.top1_loss_pp)

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        data = {"config": self.config.to_json(), "measurement": self.measurement.to_json(), "cpu_s": self.cpu_s}
        return data if self.answers is None else data | self.answers.to_json()

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Measured:
        """The inverse of `to_json`."""
        config = QuantConfig.model_validate(data["config"])
        # Older lines lack the divergences.
        answers = Answers.from_json(data) if "nats" in data else None
        return cls(config, measurement_from_json(data["measurement"]), data["cpu_s"], answers)


class MeasuredFolder:
    """The measurements of one problem: a file of lines per process, so that several can measure at once.

    The least of thousands of timings is mostly luck. A configuration may therefore be timed more than once; its latency
    is the middle one, leaving out the noisy ones where there are others. Configurations that link the very same kernels into
    as many bytes run the same instructions on other constants: their timings count as one another's. Latencies are told on
    one clock, whichever process measured them: as paired ratios they do not depend on it.

    Args:
        path: The folder.
        source: Measures what is not known.
        float_ms: Latency of the float module, milliseconds.
    """

    def __init__(self, path: Path, source: Source, float_ms: float) -> None:
        self.path, self.source, self.float_ms = path, source, float_ms
        path.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, Measured] = {}
        self._timings: dict[str, list[Latency]] = {}
        self._again_s: dict[str, list[float]] = {}
        self._answers: dict[str, Answers] = {}
        # Those that run the same instructions.
        self._twins: dict[tuple[str, int], list[str]] = {}
        # Of the process and of its start: process numbers are used again.
        self.file = path / f"{time.time_ns():x}-{os.getpid()}.jsonl"
        self._read: dict[Path, int] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read what other processes have measured since."""
        for file in sorted(self.path.glob("*.jsonl")):
            lines = [] if file == self.file else list(read_lines(file))
            for line in lines[self._read.get(file, 0) :]:
                self._keep(line)
            self._read[file] = len(lines)

    def evaluate(self, config: QuantConfig) -> Measured:
        """What is known of a configuration, measuring it if that is nothing."""
        digest = config.content_hash()
        if digest not in self.known:
            start = cpu_seconds()
            measurement, answers = self.source.measure(config)
            self._append(Measured(config, measurement, cpu_seconds() - start, answers).to_json())
        return self.known[digest]

    def with_answers(self, config: QuantConfig) -> Measured:
        """The same, and what the module answered; where that was not recorded, it is run once more."""
        found = self.evaluate(config)
        if found.answers is None:
            _, answers = self.source.measure(config)
            assert answers is not None
            self._append({"answered": config.content_hash(), **answers.to_json()})
        return self.known[config.content_hash()]

    def time_again(self, config: QuantConfig) -> None:
        """Time a known configuration once more."""
        start = cpu_seconds()
        latency = vars(self.source.time(config))
        self._append({"again": config.content_hash(), "latency": latency, "cpu_s": cpu_seconds() - start})

    def again_s(self, digest: str, times: int) -> float:
        """Processor seconds that it took to time a configuration again, so many times."""
        return sum(self._again_s.get(digest, [])[:times])

    def timings(self, digest: str) -> int:
        """How often a known configuration, or another that runs the same instructions, was timed."""
        return sum(len(self._timings[twin]) for twin in self._alike(digest))

    def instructions(self, digest: str) -> tuple[str, int]:
        """What configurations that share their timings have in common."""
        found = self.known[digest].measurement
        # What has no digest of its kernels is like itself alone.
        return found.kernels_sha256 or digest, found.memory.peak_bytes

    def _append(self, line: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        self._keep(line)

    def _keep(self, line: dict[str, Any]) -> None:
        if "answered" in line:
            self._answers[line["answered"]] = Answers.from_json(line)
            self._attach(line["answered"])
            return
        found = None if "again" in line else Measured.from_json(line)
        digest = line["again"] if found is None else found.config.content_hash()
        timing = self.on_clock(Latency(**line["latency"]) if found is None else found.measurement.latency)
        self._timings.setdefault(digest, []).append(timing)
        if found is None:
            # Older lines lack it.
            self._again_s.setdefault(digest, []).append(line.get("cpu_s", 0.0))
        # Two processes may have measured it, and the second timing may be read before the first.
        if found is not None and digest not in self.known:
            self.known[digest] = found
            self._alike(digest).append(digest)
            self._attach(digest)
        if digest in self.known:
            timings = [one for twin in self._alike(digest) for one in self._timings[twin]]
            middle = middle_of(timings)
            for twin in self._alike(digest):
                known = self.known[twin]
                self.known[twin] = replace(known, measurement=replace(known.measurement, latency=middle))

    def _alike(self, digest: str) -> list[str]:
        return self._twins.setdefault(self.instructions(digest), [])

    def _attach(self, digest: str) -> None:
        # Either may be read first.
        if digest in self.known and digest in self._answers:
            self.known[digest] = replace(self.known[digest], answers=self._answers[digest])

    def on_clock(self, timing: Latency) -> Latency:
        """A timing as of the machine that timed the float module."""
        if timing.ratio is None:
            return timing
        median_ms = timing.ratio * self.float_ms
        return replace(timing, median_ms=median_ms, spread_ms=timing.spread_ms * median_ms / timing.median_ms)


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
