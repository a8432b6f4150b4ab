"""`dashboard`: the server, the notes and the pictures it serves."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from analytic import invoke
from browser import kept_in, open_browser

from qsearch.report.page_document import page_document
from qsearch.search.study import load_study

SCRIPT = Path(__file__).parents[1] / "analytic.py"


def get(port: int, path: str) -> bytes:
    """Fetch a path from the server."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    response = connection.getresponse()
    assert response.status == 200, path
    return response.read()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, list[str]]]:
    """The folder of a study, the port that its dashboard is served on until Ctrl-C, and the command that does it."""
    pytest.importorskip("optuna_dashboard")
    folder = tmp_path_factory.mktemp("served")
    assert invoke(folder, "search", "--budget", "3").exit_code == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(SCRIPT), "dashboard", "--study", "demo", "--port", str(port)]
    server = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(port)
        yield folder, port, command
    finally:
        server.send_signal(signal.SIGINT)
        _, words = server.communicate(timeout=60)
    assert server.returncode == 0
    assert f"http://127.0.0.1:{port}" in words
    assert "Traceback" not in words


def test_dashboard_serves_notes_and_pictures(served: tuple[Path, int, list[str]]) -> None:
    folder, port, command = served
    trial = json.loads(get(port, "/api/studies/1?after=0"))["trials"][1]
    assert "| latency, ms |" in trial["note"]["body"]
    (artifact,) = trial["artifacts"]
    assert f"/artifacts/1/{trial['trial_id']}/{artifact['artifact_id']}" in trial["note"]["body"]
    assert get(port, f"/artifacts/1/{trial['trial_id']}/{artifact['artifact_id']}").startswith(b"\x89PNG")
    taken = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert taken.returncode == 2
    assert f"port {port}" in taken.stderr


def test_dashboard_shows_in_a_browser_what_the_report_says(served: tuple[Path, int, list[str]], tmp_path: Path) -> None:
    folder, port, _ = served
    document = page_document(load_study("demo", f"sqlite:///{folder}/studies/demo.db"))
    point = document["points"][0]
    with open_browser() as browser:
        page = browser.page()
        page.resize(1280, 1600)
        page.open(f"http://127.0.0.1:{port}/dashboard/studies/1/trials?numbers={point['trial']}")
        # The note of the trial: its figures, its words, and the picture of its precisions, drawn.
        assert page.until("document.body.innerText.includes('latency, ms')")
        text = page.evaluate("document.body.innerText")
        assert f"{point['latency_ms']:.3f} ± {point['latency_spread_ms']:.3f}" in text
        assert f"calibration: {point['words']}" in text
        for precision, count in point["counts"].items():
            assert f"{count} {precision}" in text
        pictures = "[...document.querySelectorAll('img[src*=\"/artifacts/\"]')]"
        assert page.until(f"{pictures}.some((one) => one.naturalWidth > 100)")
        # The study by its name, the objectives by theirs, and every layer as a parameter of the trial.
        assert "demo" in page.evaluate("document.title + document.body.innerText")
        for name in ("latency_ms", "peak_bytes", "top1_loss_pp", *(layer["name"] for layer in document["layers"])):
            assert name in text, name
        page.screenshot(kept_in(tmp_path) / "dashboard-trial.png", whole=False)
        page.open(f"http://127.0.0.1:{port}/dashboard/studies/1/note")
        assert page.until("document.body.innerText.includes('What the planner knows of the layers')")
        most = document["tables"][0]
        assert page.until(f"document.body.innerText.includes({json.dumps(most['layer'])})")
        assert page.until(f"{pictures}.some((one) => one.naturalWidth > 100)")
        page.screenshot(kept_in(tmp_path) / "dashboard-note.png", whole=False)


def wait_for(port: int) -> None:
    """Wait until something listens."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("nothing listens")


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke(tmp_path, "search", "--budget", "1").exit_code == 0
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    result = invoke(tmp_path, "dashboard", "--study", "demo")
    assert result.exit_code == 2
    assert "pip install 'qsearch[dashboard]'" in result.stderr


def test_others_are_let_in_with_a_token_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        result = invoke(tmp_path, "dashboard", "--study", "demo", "--host", host)
        assert result.exit_code == 2 and "QSEARCH_DASHBOARD_TOKEN" in result.stderr
    monkeypatch.setenv("QSEARCH_DASHBOARD_TOKEN", "short-secret")
    result = invoke(tmp_path, "dashboard", "--study", "demo", "--host", "0.0.0.0")
    assert result.exit_code == 2 and "at least 16" in result.stderr
    assert "short-secret" not in result.stderr + invoke(tmp_path, "dashboard", "--help").output
