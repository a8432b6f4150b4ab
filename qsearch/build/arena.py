"""Give the values of a program their places in one block of memory, the arena.

Values that are never alive together may share bytes. The largest value is placed first, each one into the
smallest gap between those that are alive with it (Pisarchyk and Lee 2020, "Efficient memory management for deep
neural net inference", arXiv:2001.03288: greedy by size for offset calculation). Separate buffers, each for
several values in turn, as Relax plans them, need a sixth to a third more in most networks: a buffer serves one
value at a time, however small.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["ALIGNMENT", "Arena", "Lifetime", "live_bytes", "plan_arena"]

# What kernels may assume of a buffer's address, and TVM of a view's offset.
ALIGNMENT = 64


@dataclass(frozen=True)
class Lifetime:
    """A value and when it is needed.

    Attributes:
        name: The value.
        bytes: Its size.
        first: Step that writes it.
        last: Last step that reads it, `first` or later.
    """

    name: str
    bytes: int
    first: int
    last: int

    @property
    def aligned_bytes(self) -> int:
        """Its size up to where the next value may start."""
        return -(-self.bytes // ALIGNMENT) * ALIGNMENT

    def meets(self, other: Lifetime) -> bool:
        """True if both are alive in some step."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Arena:
    """Places in the arena.

    Attributes:
        bytes: Its size.
        offsets: Value -> its first byte.
    """

    bytes: int
    offsets: dict[str, int]


def plan_arena(lifetimes: Iterable[Lifetime]) -> Arena:
    """Place every value.

    Args:
        lifetimes: The values, in any order; the plan does not depend on it.
    """
    placed: list[tuple[int, Lifetime]] = []
    for value in sorted(lifetimes, key=lambda value: (-value.bytes, value.first, value.name)):
        taken = sorted((at, at + other.aligned_bytes) for at, other in placed if value.meets(other))
        placed.append((_best_gap(taken, value.aligned_bytes), value))
    size = max((at + value.aligned_bytes for at, value in placed), default=0)
    return Arena(size, {value.name: at for at, value in placed})


def _best_gap(taken: list[tuple[int, int]], size: int) -> int:
    """Start of the smallest gap of at least `size`; the end of what is taken where there is none."""
    gaps, end = [], 0
    for start, stop in taken:
        if start - end >= size:
            gaps.append((start - end, end))
        end = max(end, stop)
    return min(gaps)[1] if gaps else end


def live_bytes(lifetimes: Sequence[Lifetime]) -> int:
    """Bytes alive together at the worst step: no arena can be smaller."""
    steps = {value.first for value in lifetimes}
    return max((sum(v.aligned_bytes for v in lifetimes if v.first <= step <= v.last) for step in steps), default=0)
