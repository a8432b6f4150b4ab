"""`dashboard`: the server, the notes and the pictures it serves."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "analytic.py"


def get(port: int, path: str) -> bytes:
    """Fetch a path from the server."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", path)
    response = connection.getresponse()
    assert response.status == 200, path
    return response.read()


def test_dashboard_serves_notes_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("optuna_dashboard")
    subprocess.run([sys.executable, str(SCRIPT), "search", "--budget", "3"], cwd=tmp_path, check=True, capture_output=True)
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
        _, words = server.communicate(timeout=10)
    assert server.returncode == 0
    assert f"http://127.0.0.1:{port}" in words
    assert "Traceback" not in words


def wait_for(port: int) -> None:
    """Wait until something listens."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("nothing listens")


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(SCRIPT), "search", "--budget", "1"], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "optuna_dashboard.py").write_text("raise ImportError('not installed')\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(SCRIPT), "dashboard", "--study", "demo"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "pip install 'qsearch[dashboard]'" in result.stderr
