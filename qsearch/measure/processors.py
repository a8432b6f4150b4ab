"""The processors that this process may use."""

from __future__ import annotations

import os

__all__ = ["available_processors"]


def available_processors() -> list[int]:
    """Their numbers, ascending: fewer than the machine has where taskset or a cgroup says so."""
    return sorted(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
