"""Which processors a module is timed on, and which are left for everything else."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qsearch.errors import UsageError
from qsearch.measure.processors import available_processors

__all__ = ["Processors", "check_jobs", "default_jobs", "split_processors"]


@dataclass(frozen=True)
class Processors:
    """Who runs where; empty where threads cannot be kept to processors.

    Attributes:
        device: Processors of the module that is timed.
        others: All other processors that this process may use.
    """

    device: frozenset[int] = frozenset()
    others: frozenset[int] = frozenset()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Run the block on the device's processors."""
        with _kept_to(self.device):
            yield

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run the block on all processors."""
        with _kept_to(self.device | self.others):
            yield

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Keep all threads of this process, and what they start, to the others."""
        before = os.sched_getaffinity(0) if self.others else set()
        _keep_threads(self.others)
        try:
            yield
        finally:
            _keep_threads(before)


@contextmanager
def _kept_to(processors: Collection[int]) -> Iterator[None]:
    """Keep this thread, and those that it starts meanwhile, to processors for the block; anywhere if there are none."""
    before = os.sched_getaffinity(0) if processors else set()
    if processors:
        os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        if processors:
            os.sched_setaffinity(0, before)


def _keep_threads(processors: Collection[int]) -> None:
    """Keep all threads of this process to processors; anywhere if there are none."""
    for thread in Path("/proc/self/task").iterdir() if processors else ():
        # It may have ended meanwhile.
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), processors)


def default_jobs(threads: int) -> int:
    """Two where a processor is left beside those of a module, else one.

    Args:
        threads: Threads a module runs on.
    """
    return min(2, _most_jobs(threads))


def _most_jobs(threads: int) -> int:
    return max(1, len(available_processors()) - threads + 1)


def check_jobs(jobs: int | None, threads: int) -> None:
    """Refuse more jobs than there are processors for.

    Args:
        jobs: Trials at a time; None for as many as there may be.
        threads: Threads a module runs on.

    Raises:
        UsageError: No processor would be left to lower and link on.
    """
    count = len(available_processors())
    if jobs is not None and jobs > _most_jobs(threads):
        raise UsageError(
            f"--jobs {jobs} needs {jobs - 1} beside the {threads} processors that a module is timed on, but this process may use "
            f"{count}; give --jobs {_most_jobs(threads)}, or let it use more (taskset, cgroup)"
        )


def split_processors(jobs: int, threads: int) -> Processors | None:
    """Set processors aside for timing.

    Args:
        jobs: Trials at a time.
        threads: Threads a module runs on.

    Returns:
        None for one job.
    """
    if jobs == 1:
        return None
    check_jobs(jobs, threads)
    available = available_processors()
    if not hasattr(os, "sched_setaffinity"):
        return Processors()
    return Processors(frozenset(available[-threads:]), frozenset(available[:-threads]))
