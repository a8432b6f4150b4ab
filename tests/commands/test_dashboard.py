"""`dashboard`: the server, the notes and the pictures it serves."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from analytic import invoke

SCRIPT = Path(__file__).parents[1] / "analytic.py"


def get(port: int, path: str) -> bytes:
    """Fetch a path from the server."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    response = connection.getresponse()
    assert response.status == 200, path
    return response.read()


def test_dashboard_serves_notes_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("optuna_dashboard")
    assert invoke(tmp_path, "search", "--budget", "3").exit_code == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(SCRIPT), "dashboard", "--study", "demo", "--port", str(port)]
    server = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(port)
        trial = json.loads(get(port, "/api/studies/1?after=0"))["trials"][1]
        assert "| latency, ms |" in trial["note"]["body"]
        (artifact,) = trial["artifacts"]
        assert f"/artifacts/1/{trial['trial_id']}/{artifact['artifact_id']}" in trial["note"]["body"]
        assert get(port, f"/artifacts/1/{trial['trial_id']}/{artifact['artifact_id']}").startswith(b"\x89PNG")
        taken = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert taken.returncode == 2
        assert f"port {port}" in taken.stderr
    finally:
        server.send_signal(signal.SIGINT)
        _, words = server.communicate(timeout=60)
    assert server.returncode == 0
    assert f"http://127.0.0.1:{port}" in words
    assert "Traceback" not in words


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
