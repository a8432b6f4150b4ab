"""Two trials at a time: while another process measures one, this one writes down, asks, lowers and links.

A trial is timed alone: the measuring process does one thing after the other, and while it times it has processors for
itself, because this process keeps to the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from typing import Any

from qsearch.config import QuantConfig
from qsearch.errors import MeasureError
from qsearch.measure.measurement import Measurement
from qsearch.search.loop.early_stopping import StoppingRule
from qsearch.search.loop.processors import Processors
from qsearch.search.loop.workers import Worker

__all__ = ["Pipeline"]


class Pipeline:
    """A way to build modules here and to measure them in a worker process; use as a context manager.

    Args:
        pack: Lowers and links a configuration, to be measured in another process.
        worker: Measures what was packed; started at the beginning and ended at the end.
        processors: Who runs where.
    """

    def __init__(self, pack: Callable[[QuantConfig], Any], worker: Worker, processors: Processors = Processors()) -> None:
        self.pack, self._worker, self._processors = pack, worker, processors

    def __enter__(self) -> Pipeline:
        """Start the worker, which takes its seconds to get ready."""
        self._worker.start()
        return self

    def __exit__(self, *error: object) -> None:
        """End the worker, whatever it is at."""
        self._worker.close()

    def settle(self) -> None:
        """Wait until the worker does nothing: it disturbs what is timed here while it gets ready."""
        self._worker.settle()

    def aside(self) -> AbstractContextManager[None]:
        """Keep this process off the processors of what is timed."""
        return self._processors.aside()

    def measure(self, packed: Any, rule: StoppingRule | None) -> Future[Measurement]:
        """Measure what was packed; whatever was given before must have been waited for.

        Whoever waits behind a configuration that the worker dies of would seem to be the cause as well.

        Args:
            packed: From `pack`.
            rule: For early stopping.

        Returns:
            For `result`.
        """
        return self._worker.measure(packed, rule)

    @staticmethod
    def result(measured: Future[Measurement]) -> Measurement:
        """Wait for a measurement.

        Raises:
            TrialError: As from `evaluate`, or the worker died.
            EarlyStop: The rule has seen enough.
        """
        try:
            return measured.result()
        except BrokenProcessPool as error:
            raise MeasureError(
                "the process that measures died at this configuration, of a defect in a kernel or for want of memory "
                f"({str(error).strip().splitlines()[-1]}); with --jobs 1 the search itself would have"
            ) from error
