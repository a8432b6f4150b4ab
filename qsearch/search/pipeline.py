"""Two trials at a time: while one is measured, the next is lowered and linked in another process.

A trial is timed alone. Timings and accuracy runs are steps of one thread, so that no two of them ever overlap, and while it
times, that thread has processors for itself: the worker process and the driver keep to the others.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from typing import Any

from qsearch.config import QuantConfig
from qsearch.errors import BuildError
from qsearch.measure.measurement import Measurement
from qsearch.search.early_stopping import StoppingRule
from qsearch.search.processors import Processors
from qsearch.search.workers import Worker

__all__ = ["Pipeline"]


class Pipeline:
    """A worker process that prepares, and a thread that measures; use as a context manager.

    Args:
        worker: Packs configurations; closed at the end.
        unpack: From what the worker answers to what is measured.
        measure: Measures one prepared configuration, called with it and a StoppingRule or None.
        processors: Who runs where.
    """

    def __init__(
        self,
        worker: Worker,
        unpack: Callable[[Any], Any],
        measure: Callable[[Any, StoppingRule | None], Measurement],
        processors: Processors = Processors(),
    ) -> None:
        self._worker, self._unpack, self._measure, self._processors = worker, unpack, measure, processors
        self._context = ExitStack()

    def __enter__(self) -> Pipeline:
        """Keep the calling thread aside."""
        self._context.enter_context(self._processors.aside())
        self._loader = self._context.enter_context(ThreadPoolExecutor(1))
        self._device = self._context.enter_context(ThreadPoolExecutor(1, initializer=self._processors.everywhere))
        self._context.callback(self._end)
        return self

    def __exit__(self, *error: object) -> None:
        """End the worker, and wait until the measurement that is under way has come to its end."""
        self._context.close()

    def _end(self) -> None:
        for threads in (self._loader, self._device):
            threads.shutdown(wait=False, cancel_futures=True)
        # The loader may be waiting for it.
        self._worker.close()

    def prepare(self, config: QuantConfig) -> Future[Any]:
        """Lower and link a configuration, and load the result."""
        return self._loader.submit(self._load, config)

    def measure(self, prepared: Future[Any], rule: StoppingRule | None) -> Future[Measurement]:
        """Measure what was prepared, as soon as it is and everything before is measured.

        Args:
            prepared: From `prepare`.
            rule: For early stopping.

        Returns:
            The measurement, or what `evaluate` would raise; a BuildError if the worker died.
        """
        return self._device.submit(lambda: self._measure(prepared.result(), rule))

    def _load(self, config: QuantConfig) -> Any:
        try:
            # One at a time: whoever waits behind a configuration that the worker dies of would seem to be the cause as well.
            return self._unpack(self._worker.submit(config).result())
        except BrokenProcessPool as error:
            raise BuildError(
                "the process that lowers and links died at this configuration, of a defect in the compiler or for want of "
                f"memory ({str(error).strip().splitlines()[-1]}); with --jobs 1 the search itself would have"
            ) from error
