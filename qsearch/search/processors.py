"""Which processors a module is timed on, and which are left for everything else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from qsearch.errors import UsageError

__all__ = ["MOST_JOBS", "Processors", "check_jobs", "default_jobs", "split_processors"]

MOST_JOBS = 2
# Seconds for which a thread may keep another from running Python while a module is timed. The measuring thread needs Python
# between two repeats; at the usual 5 ms the driver's records would stretch a timing to twice its length.
SWITCH_S = 1e-5


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
        """Run the block on the device's processors, and let no other thread of this process keep Python from it for long."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        try:
            with _kept_to(self.device):
                yield
        finally:
            sys.setswitchinterval(before)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run the block on the others; threads and processes that it starts stay there."""
        with _kept_to(self.others):
            yield

    def everywhere(self) -> None:
        """Let the calling thread, and those that it starts, run on all of them."""
        if self.device:
            os.sched_setaffinity(0, self.device | self.others)


@contextmanager
def _kept_to(processors: frozenset[int]) -> Iterator[None]:
    if not processors:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _available() -> list[int]:
    return sorted(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def default_jobs(threads: int) -> int:
    """Two where a processor is left beside those of a module, else one.

    Args:
        threads: Threads a module runs on.
    """
    return min(MOST_JOBS, max(1, len(_available()) - threads + 1))


def check_jobs(jobs: int | None, threads: int) -> None:
    """Refuse more jobs than there are processors for.

    Args:
        jobs: Trials at a time; None for as many as there may be.
        threads: Threads a module runs on.

    Raises:
        UsageError: No processor would be left to lower and link on.
    """
    count = len(_available())
    if jobs is not None and jobs > default_jobs(threads):
        raise UsageError(
            f"--jobs {jobs} needs a processor beside the {threads} that a module is timed on, but this process may use {count}; "
            "give --jobs 1, or let it use more (taskset, cgroup)"
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
    available = _available()
    if not hasattr(os, "sched_setaffinity"):
        return Processors()
    return Processors(frozenset(available[-threads:]), frozenset(available[:-threads]))
