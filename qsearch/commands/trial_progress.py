"""Progress of a search on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from optuna.trial import FrozenTrial, TrialState
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qsearch.commands.terminal import say, stderr_console
from qsearch.measure.measurement import Measurement
from qsearch.report.pictures import byte_text

__all__ = ["TrialProgress"]

SECONDS_BETWEEN_LINES = 10.0


class TrialProgress:
    """Shows each finished trial; use as a context manager around the search."""

    def __init__(self, done: int, budget: int, baseline: Measurement) -> None:
        """Start at `done` of `budget` completed trials; latencies are shown as speed-up over `baseline`."""
        console = stderr_console()
        self._done, self._budget, self._baseline = done, budget, baseline
        self._bar: Progress | None = None
        self._last_line = -SECONDS_BETWEEN_LINES
        if console.is_terminal:
            bar = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(TextColumn("trials"), *bar, TextColumn("{task.fields[last]}"), console=console)
            self._task = self._bar.add_task("trials", total=budget, completed=done, last="")

    def __enter__(self) -> TrialProgress:
        """Show the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()

    def on_trial(self, trial: FrozenTrial) -> None:
        """Show a trial that was measured or failed."""
        if trial.state != TrialState.COMPLETE:
            self._line(f"trial {trial.number} failed: {trial.user_attrs.get('error')}")
            return
        self._done += 1
        latency_ms, peak_bytes, loss_pp = trial.values
        speedup = self._baseline.latency.median_ms / latency_ms
        text = f"last: {latency_ms:.3f} ms ({speedup:.2f}x), {byte_text(peak_bytes)}, loss {loss_pp:+.2f} pp"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, last=text)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES or self._done >= self._budget:
            self._last_line = time.monotonic()
            say(f"trial {self._done} of {self._budget}, {text}")

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False)
        else:
            say(text)
