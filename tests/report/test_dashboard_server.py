"""Who is answered by the dashboard's server."""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import threading
from collections.abc import Iterable
from typing import Any

import pytest

from qsearch.report import dashboard_server
from qsearch.report.dashboard_server import guarded

TOKEN = "a token of some length"


def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"secret"]


def asked(token: str | None, **headers: str) -> tuple[str, dict[str, str], bytes]:
    """Status, headers and body of an answer."""
    told: list[Any] = []
    given = {f"HTTP_{name.upper()}": value for name, value in headers.items()}
    body = b"".join(guarded(app, token)({"HTTP_HOST": "localhost:8080"} | given, lambda *answer: told.extend(answer)))
    return told[0], dict(told[1]), body


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"me:{password}".encode()).decode()


@pytest.mark.parametrize("given", [f"Bearer {TOKEN}", f"bearer {TOKEN}", basic(TOKEN)])
def test_who_knows_the_token_is_answered(given: str) -> None:
    assert asked(TOKEN, authorization=given, host="elsewhere:1")[2] == b"secret"


@pytest.mark.parametrize(
    "given",
    ["", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Digest {TOKEN}", TOKEN, basic(""), basic(TOKEN[:-1]), "Basic é", "Basic %%"],
)
def test_who_does_not_is_asked_for_it(given: str) -> None:
    status, headers, body = asked(TOKEN, authorization=given)
    assert status.startswith("401") and headers["WWW-Authenticate"].startswith("Basic") and b"secret" not in body


@pytest.mark.parametrize("host", ["localhost:8080", "127.0.0.1:8080", "[::1]:8080", "localhost"])
def test_this_machine_needs_none(host: str) -> None:
    assert asked(None, host=host)[2] == b"secret"
    assert asked(None, host=host, origin=f"http://{host}")[2] == b"secret"


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example:8080"},
        {"host": ""},
        {"host": "[::"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://[::"},
    ],
)
def test_pages_of_other_sites_are_not_answered(headers: dict[str, str]) -> None:
    """A name of theirs may lead here, and a form of theirs may be sent here."""
    status, _, body = asked(None, **headers)
    assert status.startswith("403") and b"secret" not in body


def test_a_form_of_another_site_is_refused_whoever_shows_it() -> None:
    assert asked(TOKEN, authorization=basic(TOKEN), origin="http://evil.example")[0].startswith("403")


def test_the_server_listens_where_it_is_told_and_logs_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threading.Thread(target=dashboard_server.serve, args=(guarded(app, TOKEN), "127.0.0.1", port), daemon=True).start()
    for _ in range(1000):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with contextlib.suppress(ConnectionRefusedError):
            connection.request("GET", "/", headers={"Authorization": f"Bearer {TOKEN}"})
            break
    assert connection.getresponse().read() == b"secret"
    with pytest.raises(OSError, match="in use"):
        dashboard_server.serve(guarded(app, TOKEN), "127.0.0.1", port)
    assert TOKEN not in "".join(capfd.readouterr())
