"""`dashboard`: Optuna's dashboard over a study, with notes and pictures."""

from __future__ import annotations

from typing import Annotated

import typer

from qsearch.commands.options import Storage, Study
from qsearch.commands.terminal import say
from qsearch.errors import UsageError

__all__ = ["dashboard"]

HOST = "127.0.0.1"


def dashboard(
    study: Study,
    storage: Storage = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on localhost.")] = 8080,
) -> None:
    """Open Optuna's dashboard on localhost over a study; Ctrl-C ends it."""
    from optuna.artifacts import FileSystemArtifactStore

    from qsearch.search.storage import artifact_folder
    from qsearch.search.study import load_study

    handle = load_study(study, storage)
    try:
        from optuna_dashboard import run_server
    except ImportError as error:
        raise UsageError("the dashboard is an extra: pip install 'qsearch[dashboard]'") from error
    folder = artifact_folder(study, handle.url)
    # The search makes this folder; a study brought here without it still has its numbers to show.
    store = FileSystemArtifactStore(folder) if folder.is_dir() else None
    say(f"study {study} at http://{HOST}:{port}/dashboard/studies/{handle.study._study_id}; Ctrl-C ends it")
    try:
        run_server(handle.storage, host=HOST, port=port, artifact_store=store)
    except OSError as error:
        raise UsageError(f"cannot listen on port {port}: {error.strerror}; give another --port") from error
    except KeyboardInterrupt:
        say("dashboard closed")
