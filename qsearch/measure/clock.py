"""Wall time of the steps of one measurement."""

from __future__ import annotations

import time

__all__ = ["Clock"]


class Clock:
    """Wall time of consecutive steps.

    Attributes:
        seconds: Step -> its time so far, seconds.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under a name."""
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
