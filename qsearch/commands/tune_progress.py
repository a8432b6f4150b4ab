"""The progress bar of tuning, on stderr."""

from __future__ import annotations

from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from qsearch.commands.terminal import stderr_console

__all__ = ["TuneProgress"]


class TuneProgress:
    """A bar over kernels."""

    def __init__(self) -> None:
        columns = (TextColumn("tuning kernels"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=stderr_console())
        self._task = self._bar.add_task("tune", total=None)

    def __enter__(self) -> TuneProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.stop()

    def on_kernel(self, done: int, total: int) -> None:
        """Show how many kernels are done."""
        self._bar.update(self._task, completed=done, total=total)
