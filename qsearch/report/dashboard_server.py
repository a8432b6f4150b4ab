"""Serve Optuna's dashboard to whoever may see it: this machine, or those who know a token."""

from __future__ import annotations

import base64
import hmac
import socket
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

__all__ = ["LOCAL", "guarded", "serve"]

# What this machine alone can reach; the names that a browser on it uses.
LOCAL = ("127.0.0.1", "localhost", "::1")
# A client that says nothing for so long is hung up on: there is one thread.
TIMEOUT_S = 30

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def guarded(app: Application, token: str | None) -> Application:
    """An application that answers those alone who may see it.

    Args:
        app: The application.
        token: What they have to know, as a bearer's token or as the password of any user; None for those who ask for this
            machine by a local name. Pages of other sites, which a browser on this machine may show, use neither.
    """

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        refusal = _refusal(environ, token)
        if refusal is None:
            return app(environ, start_response)
        status, headers = refusal
        start_response(status, [("Content-Type", "text/plain; charset=utf-8"), *headers])
        return [f"{status}\n".encode()]

    return answer


def _refusal(environ: dict[str, Any], token: str | None) -> tuple[str, list[tuple[str, str]]] | None:
    host, origin = environ.get("HTTP_HOST", ""), environ.get("HTTP_ORIGIN")
    if token is not None and not _knows(environ.get("HTTP_AUTHORIZATION", ""), token):
        return "401 Unauthorized: the password is the token", [("WWW-Authenticate", 'Basic realm="qsearch", charset="UTF-8"')]
    if token is None and _name_of(host) not in LOCAL:
        return "403 Forbidden: ask for localhost", []
    if origin is not None and origin.partition("//")[2] != host:
        return "403 Forbidden: asked for by another site", []
    return None


def _knows(given: str, token: str) -> bool:
    """Whether a header has the token."""
    kind, _, value = given.partition(" ")
    if kind.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2]
        except ValueError:
            return False
    elif kind.lower() != "bearer":
        return False
    return hmac.compare_digest(value.encode(), token.encode())


def _name_of(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def serve(app: Application, host: str, port: int) -> None:
    """Answer until Ctrl-C; what is asked for is not logged.

    Raises:
        OSError: The port is taken, or there is no such address.
    """
    with make_server(host, port, app, _Server6 if ":" in host else WSGIServer, _Handler) as server:
        server.serve_forever()


class _Server6(WSGIServer):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = TIMEOUT_S

    def address_string(self) -> str:
        """The client's address; its name is not asked for."""
        return str(self.client_address[0])

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing."""
