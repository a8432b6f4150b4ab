"""More workers on this machine: what `search --jobs N` starts beside its own two processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

from qsearch.search.evaluation.evaluator import Progress
from qsearch.search.study import StudyHandle
from qsearch.session.supervisor import die_with_parent

__all__ = ["COMMAND_LINE", "local_workers"]

# The command line from Python; commands give the words that they were started with.
COMMAND_LINE = (sys.executable, "-c", "from qsearch.commands.app import main; main()")
# How long a worker has to notice that the study is finished, and to give its trial back once it is told to end, seconds.
_BY_ITSELF_S, _FAREWELL_S = 3.0, 20.0


@contextmanager
def local_workers(handle: StudyHandle, count: int, command: Sequence[str], say: Progress) -> Iterator[None]:
    """Keep workers at a study for the block.

    Args:
        handle: The study.
        count: How many.
        command: How the command line is started.
        say: Told of those that fail.
    """
    started: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
    try:
        for _ in range(count):
            words = [*command, "worker", "--study", handle.name, "--jobs", "1"]
            # Kept for what one that fails had to say.
            errors: Any = tempfile.TemporaryFile()  # noqa: SIM115
            quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": errors}
            # The storage not as an argument: everybody on this machine sees those, and a URL may hold a password.
            environment = os.environ | {"QSEARCH_STORAGE": handle.url}
            process = subprocess.Popen(words, env=environment, preexec_fn=_end_with_parent, start_new_session=True, **quiet)
            started.append((process, errors))
        yield
    finally:
        deadline = time.monotonic() + _BY_ITSELF_S
        for process, _ in started:
            # Where the budget is met it leaves by itself.
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.send_signal(signal.SIGINT)
        for process, errors in started:
            try:
                status = process.wait(_FAREWELL_S)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
            errors.seek(0)
            told = errors.read().decode(errors="replace").strip().splitlines()
            if status not in (0, 130, -signal.SIGINT) and told:
                say(f"one of {count} workers ended with status {status}: {told[-1]}")
            errors.close()


def _end_with_parent() -> None:
    """Between fork and exec: be killed when the process that searches is."""
    die_with_parent()
    # A search in the background of a shell has it ignored, and so would have its workers.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
