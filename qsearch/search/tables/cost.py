"""What a configuration is predicted to cost."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Cost"]


@dataclass(frozen=True)
class Cost:
    """Predicted cost of a configuration.

    Attributes:
        latency_ms: Sum of its kernels' times.
        peak_bytes: As `Memory.peak_bytes`, exact.
    """

    latency_ms: float
    peak_bytes: int
