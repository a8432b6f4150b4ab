"""The command line: one typer app, one file per verb, one place where errors become messages."""

from __future__ import annotations

import errno
import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer

from qsearch.commands.adapt import adapt
from qsearch.commands.cache import cache
from qsearch.commands.compare import compare
from qsearch.commands.dashboard import dashboard
from qsearch.commands.diagnose import diagnose
from qsearch.commands.doctor import doctor
from qsearch.commands.evaluate import evaluate
from qsearch.commands.export import export
from qsearch.commands.finetune import finetune
from qsearch.commands.front import front
from qsearch.commands.pack import measure_pack, pack
from qsearch.commands.report import report
from qsearch.commands.run import run
from qsearch.commands.search import search
from qsearch.commands.status import status
from qsearch.commands.tables import tables
from qsearch.commands.terminal import INTERRUPTED, OWN_PROCESS, say
from qsearch.commands.tune import tune
from qsearch.commands.verify import verify
from qsearch.commands.worker import worker
from qsearch.errors import QSearchError

__all__ = ["app", "main"]

# Verbs import torch, TVM and Optuna inside their functions: --help must not wait for them.
VERBS: tuple[Callable[..., None], ...] = (
    search,
    worker,
    status,
    front,
    report,
    compare,
    evaluate,
    diagnose,
    finetune,
    tables,
    tune,
    export,
    verify,
    run,
    adapt,
    pack,
    measure_pack,
    doctor,
    cache,
    dashboard,
)


# What an environment may do to any command, and what helps.
WAYS_OUT = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "see to its permissions"),
    errno.EIO: "check the disk",
    errno.ENAMETOOLONG: "give a shorter name",
}


def bounded(verb: Callable[..., None]) -> Callable[..., None]:
    """Turn the errors a user can meet into one message and an exit code.

    Anything else is a defect and keeps its traceback.
    """

    @functools.wraps(verb)
    def run(*args: Any, **options: Any) -> None:
        try:
            verb(*args, **options)
        except QSearchError as error:
            say(f"error: {error}")
            raise typer.Exit(error.exit_code) from None
        except OSError as error:
            if error.errno not in WAYS_OUT:
                raise
            what = error.filename or "a file"
            way_out = f"{WAYS_OUT[error.errno]}, then run the same command again: nothing is lost"
            say(f"error: cannot use {what}: {error.strerror}; {way_out}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            say("interrupted; whatever was finished is kept")
            raise typer.Exit(INTERRUPTED) from None

    return run


app = typer.Typer(
    name="qsearch",
    help="Search per-layer precisions of a vision model, every trial compiled and measured.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    # A callback keeps verbs as sub-commands however few there are.
    pass


for _verb in VERBS:
    app.command()(bounded(_verb))


def main() -> None:
    """Run the command line."""
    if not sys.warnoptions:
        # What libraries deprecate among each other is nothing a user can act on.
        warnings.simplefilter("ignore")
    sys.exit(app(obj=OWN_PROCESS))
