"""A log of a search for programs: one JSON document a line."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from optuna.trial import FrozenTrial

from qsearch.errors import UsageError

__all__ = ["TrialLog"]

# What of a trial's attributes is told, beside its state: the objectives, what ended it, where it came from.
_TOLD = ("config_hash", "latency_ms", "peak_bytes", "top1_loss_pp", "top1_loss_bounds_pp", "images", "stopped_early")
_ALSO = ("noisy_timing", "anchor", "retry_of", "attempt", "error")


class TrialLog:
    """Appends a line for the beginning of a search, for every trial that was measured or failed, and for the end.

    Every line has `time` (UTC, ISO 8601) and `event`: 'begin', 'trial' or 'end'. Lines are written whole, one system call each,
    so that a search that is killed leaves no half one. Nothing in them is secret: storages are named without passwords.

    Args:
        path: The file; None for no log.

    Raises:
        UsageError: It cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._stream: IO[bytes] | None = None
        if path is None:
            return
        try:
            self._stream = path.open("ab", buffering=0)
            if path.read_bytes()[-1:] not in (b"", b"\n"):
                # A power cut has left half a line: it shall not take the next one with it.
                self._stream.write(b"\n")
        except OSError as error:
            raise UsageError(f"cannot write the log {path}: {error.strerror}; give --log-json another file") from error

    def __enter__(self) -> TrialLog:
        """Begin."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the file; what ended the search early is told."""
        if kind is not None:
            self.tell("end", reason=kind.__name__, error=str(error))
        if self._stream is not None:
            self._stream.close()

    def tell(self, event: str, **facts: Any) -> None:
        """Write one line."""
        if self._stream is not None:
            line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **facts}
            self._stream.write(json.dumps(line, default=str).encode() + b"\n")

    def on_trial(self, trial: FrozenTrial) -> None:
        """Tell of a trial."""
        attributes = trial.user_attrs
        seconds = attributes.get("measurement", {}).get("seconds")
        told = {name: attributes[name] for name in (*_TOLD, *_ALSO) if name in attributes}
        took = None if trial.duration is None else round(trial.duration.total_seconds(), 3)
        self.tell("trial", trial=trial.number, state=trial.state.name.lower(), **told, seconds=took, stage_seconds=seconds)
