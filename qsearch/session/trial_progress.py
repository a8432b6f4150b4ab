"""Progress of a search: a bar on a terminal and in a notebook, a line now and then elsewhere."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qsearch.measure.latency import MOST_SPREAD
from qsearch.measure.measurement import Measurement
from qsearch.report.pictures import byte_text
from qsearch.search.evaluation.evaluator import Progress as Say

__all__ = ["TrialProgress"]

SECONDS_BETWEEN_LINES = 10.0
NOISE = (
    f"this machine is too noisy to time on: beside float, a module's time spreads by more than {MOST_SPREAD:.0%} of itself, even "
    "when timed for longer. End what else is running, or pin the search to an idle core (taskset -c N); the trials concerned "
    "carry the attribute noisy_timing"
)


class TrialProgress:
    """Shows each finished trial; use as a context manager around the search."""

    def __init__(self, counts: tuple[int, int], baseline: Measurement, say: Say, console: Console) -> None:
        """Start.

        Args:
            counts: Measured trials there are, and how many there shall be.
            baseline: The float module; latencies are shown as speed-up over it.
            say: Called with lines where there is no bar.
            console: Where the bar is drawn, if it is a terminal or a notebook.
        """
        (self._done, self._budget), self._baseline, self._say = counts, baseline, say
        self._bar: Progress | None = None
        self._last_line = -SECONDS_BETWEEN_LINES
        self._noise_said = False
        if _draws_bars(console):
            bar = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(TextColumn("trials"), *bar, TextColumn("{task.fields[last]}"), console=console)
            self._task = self._bar.add_task("trials", total=self._budget, completed=self._done, last="")

    def __enter__(self) -> TrialProgress:
        """Show the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the terminal to what is said inside the block, which would be written behind the bar."""
        if self._bar is not None:
            self._bar.stop()
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.start()

    def on_trial(self, trial: FrozenTrial, done: int) -> None:
        """Show a trial that was measured or failed; so many are measured now, by whomever."""
        if trial.state == TrialState.FAIL:
            self._line(f"trial {trial.number} failed: {trial.user_attrs.get('error')}")
            return
        if trial.user_attrs.get("noisy_timing") and not self._noise_said:
            self._noise_said = True
            self._line(NOISE)
        self._done = done
        latency_ms, peak_bytes = trial.user_attrs["latency_ms"], trial.user_attrs["peak_bytes"]
        speedup = self._baseline.latency.median_ms / latency_ms
        loss = f"loss {trial.values[2]:+.2f} pp" if trial.state == TrialState.COMPLETE else trial.user_attrs["stopped_early"]
        text = f"last: {latency_ms:.3f} ms ({speedup:.2f}x), {byte_text(peak_bytes)}, {loss}"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, last=text)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES or self._done >= self._budget:
            self._last_line = time.monotonic()
            self._say(f"trial {self._done} of {self._budget}, {text}")

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False)
        else:
            self._say(text)


def _draws_bars(console: Console) -> bool:
    """Whether a bar can be drawn there; in a notebook it takes ipywidgets."""
    return console.is_terminal or (console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None)
