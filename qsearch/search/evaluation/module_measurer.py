"""From a linked module to its measurement: the part of a trial that needs images and a quiet machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from qsearch.measure.accuracy import run_blocks
from qsearch.measure.clock import Clock
from qsearch.measure.devices.device import Device, Prepared
from qsearch.measure.devices.local import LocalDevice
from qsearch.measure.image_blocks import ImageHistory
from qsearch.measure.latency import first_images, middle_of
from qsearch.measure.measurement import Latency, Measurement
from qsearch.measure.task import Scorer
from qsearch.search.locks import lane_held
from qsearch.search.loop.early_stopping import StoppingRule
from qsearch.search.loop.processors import Processors
from qsearch.search.loop.workers import Measure

__all__ = ["AGAIN", "ModuleMeasurer"]

# How often a module that reaches the front is timed again.
AGAIN = 2


@dataclass(frozen=True)
class ModuleMeasurer:
    """Measures modules of one model on the search images; small when it is sent to another process.

    Attributes:
        open_reference: Makes the device's handle of the float module; on this machine, a virtual machine.
        reference_ms: The latency that all others are counted against, milliseconds.
        open_images: Maps the images, float32 (N, C, H, W).
        scorer: Of these images.
        float_logits: float32 (N, classes) of the float module.
        threads: Threads a module runs on.
        processors: Who runs where.
        device: What modules are timed on.
        runs_on: What they are run on for their outputs, 'cpu' or 'cuda'.
        batch: Images of one inference.
        lane: Held while anything is measured, see `lane_file`; None where nobody else does on this machine.
    """

    open_reference: Callable[[], Any]
    reference_ms: float
    open_images: Callable[[], np.ndarray]
    scorer: Scorer
    float_logits: np.ndarray
    threads: int
    processors: Processors = Processors()
    device: Device = LocalDevice()
    runs_on: str = "cpu"
    batch: int = 1
    lane: Path | None = None

    def open(self) -> Measure:
        """Get ready in a process of its own."""
        with self.processors.alone():
            _ = self.reference
        # All pages at once: what a worker process grows by after its first task counts as a leak.
        self.images.max()
        return self.measure

    @cached_property
    def reference(self) -> Any:
        """The device's handle of the float module."""
        return self.open_reference()

    @cached_property
    def images(self) -> np.ndarray:
        """The search images."""
        return self.open_images()

    @cached_property
    def history(self) -> ImageHistory:
        """What this process has seen of the images."""
        assert self.scorer.labels is not None
        return ImageHistory(self.float_logits, self.scorer.labels)

    def measure(self, prepared: Prepared, rule: StoppingRule | None = None) -> Measurement:
        """Time a module, then score it.

        Its latency is that of the baseline times the paired ratio of the two, see `measure_paired`. One that reaches the front
        by what the rule knows of is timed again, and the middle of its timings counts: the best of many single ones would be
        there by luck, and would stop others that are better.

        Raises:
            TrialError: It cannot be run.
            EarlyStop: The rule has seen enough.
        """
        with lane_held(self.lane):
            return self._measure(prepared, rule)

    def _measure(self, prepared: Prepared, rule: StoppingRule | None) -> Measurement:
        clock = Clock()
        with self.processors.alone():
            handle = self.device.handle(prepared)
            latency = self._timed(handle)
        clock.lap("latency")
        # Without a look between them, images need no blocks.
        check = None if rule is None or not rule.stops else partial(rule.check, latency, prepared.memory)
        with self.processors.together():
            accuracy = self.scorer.compare(self.logits(prepared, check), self.float_logits)
        clock.lap("accuracy")
        values = (latency.median_ms, float(prepared.memory.peak_bytes), accuracy.top1_loss_pp)
        if rule is not None and latency.source == "measured" and not rule.dominated(values):
            with self.processors.alone():
                latency = middle_of([latency, *(self._timed(handle) for _ in range(AGAIN))])
            clock.lap("latency")
        return Measurement(latency, prepared.memory, accuracy, prepared.seconds | clock.seconds, prepared.kernels_sha256)

    def _timed(self, handle: Any) -> Latency:
        image = first_images(self.images, self.batch)
        (latency,) = self.device.paired(self.reference, [handle], image, self.reference_ms)
        return latency

    def logits(self, prepared: Prepared, check: Callable[..., None] | None) -> np.ndarray:
        """What a module computes, float32 (N, classes), unless the check stops it before the first or after a block."""
        if check is not None:
            check()
        run = partial(run_blocks, prepared.open, self.images, batch=self.batch, threads=self.threads, device=self.runs_on)
        if check is None or self.scorer.labels is None:
            (logits,) = run([np.arange(self.scorer.count)])
            return logits
        blocks = self.history.blocks(self.batch)
        return self.history.run(blocks, run(blocks), check)
