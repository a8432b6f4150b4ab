"""`dashboard`: Optuna's dashboard over a study, with notes and pictures."""

from __future__ import annotations

from typing import Annotated

import typer

from qsearch.commands.options import Storage, Study
from qsearch.commands.terminal import say
from qsearch.errors import UsageError

__all__ = ["dashboard"]

TOKEN_VARIABLE = "QSEARCH_DASHBOARD_TOKEN"
LEAST_TOKEN = 16


def dashboard(
    study: Study,
    storage: Storage = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8080,
    host: Annotated[str, typer.Option(help="Address to listen on; any but this machine's own needs a token.")] = "127.0.0.1",
    token: Annotated[
        str | None,
        typer.Option(
            envvar=TOKEN_VARIABLE,
            help=f"What others must know, as the password of any user: at least {LEAST_TOKEN} characters. Others on this machine "
            "can read it in a command line, not in the variable.",
        ),
    ] = None,
) -> None:
    """Open Optuna's dashboard over a study, on localhost unless told otherwise; Ctrl-C ends it."""
    from optuna.artifacts import FileSystemArtifactStore

    from qsearch.report.dashboard_server import LOCAL, guarded, serve
    from qsearch.search.storage import artifact_folder
    from qsearch.search.study import load_study

    if token is None and host not in LOCAL:
        raise UsageError(f"--host {host} lets others in, who could change the study: set {TOKEN_VARIABLE}, or give --token")
    if token is not None and len(token) < LEAST_TOKEN:
        raise UsageError(f"the token has {len(token)} characters, at least {LEAST_TOKEN} are needed")
    handle = load_study(study, storage)
    try:
        from optuna_dashboard import wsgi
    except ImportError as error:
        raise UsageError("the dashboard is an extra: pip install 'qsearch[dashboard]'") from error
    folder = artifact_folder(study, handle.url)
    # The search makes this folder; a study brought here without it still has its numbers to show.
    store = FileSystemArtifactStore(folder) if folder.is_dir() else None
    name = f"[{host}]" if ":" in host else host
    say(f"study {study} at http://{name}:{port}/dashboard/studies/{handle.study._study_id}; Ctrl-C ends it")
    try:
        serve(guarded(wsgi(handle.storage, artifact_store=store), token), host, port)
    except OSError as error:
        raise UsageError(f"cannot listen on {name}, port {port}: {error.strerror}; give another --port") from error
    except KeyboardInterrupt:
        say("dashboard closed")
