"""What commands share of the terminal: words and progress to stderr, the result to stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

__all__ = [
    "INFEASIBLE",
    "INTERRUPTED",
    "OWN_PROCESS",
    "is_own_process",
    "print_json",
    "print_table",
    "say",
    "stderr_console",
    "stdout_reserved",
]


# 128 + SIGINT, as shells have it.
INTERRUPTED = 130
# A search that ended without a configuration within its constraints.
INFEASIBLE = 3
# What the command line gives its commands, where it is all that the process does.
OWN_PROCESS = "own process"


def is_own_process(context: typer.Context) -> bool:
    """Whether this process was started for the command alone, and may be forked."""
    return bool(context.obj == OWN_PROCESS)


def stderr_console() -> Console:
    """A console on stderr; made anew, so that it follows a redirected stderr."""
    return Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """Print one line for people, on stderr."""
    stderr_console().print(message, markup=False, soft_wrap=True)


def print_json(document: Any) -> None:
    """Print one JSON document on stdout; NaN and infinity are not JSON and are a defect here."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def print_table(table: Table) -> None:
    """Print a table on stdout, as wide as it needs to be where stdout is not a terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    console.print(table)


@contextmanager
def stdout_reserved() -> Iterator[None]:
    """Send whatever libraries print inside the block to stderr: stdout holds the result and nothing else."""
    with redirect_stdout(sys.stderr):
        yield
