"""A PostgreSQL server of a test's own, where Debian's package is installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PACKAGES = Path("/usr/lib/postgresql")


class Postgres:
    """A cluster in a folder, on a port of this machine.

    Args:
        programs: Folder of initdb and pg_ctl.
        folder: Where; everything in it is the server's.
    """

    def __init__(self, programs: Path, folder: Path) -> None:
        self.programs, self.folder = programs, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    @property
    def url(self) -> str:
        """For SQLAlchemy; with a password, which nobody may see."""
        return f"postgresql+psycopg://qsearch:secret@127.0.0.1:{self.port}/postgres"

    def run(self, program: str, *arguments: str) -> None:
        """Run a program of the package, which refuses to run as root."""
        command = [str(self.programs / program), *arguments]
        if os.getuid() == 0:
            command = ["runuser", "-u", "postgres", "--", *command]
        subprocess.run(command, check=True, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def create(self) -> None:
        """Make the cluster."""
        self.run("initdb", "-D", str(self.folder / "data"), "-U", "qsearch", "--auth=trust", "--no-sync")

    def start(self) -> None:
        """Start the server."""
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder} -c fsync=off"
        self.run("pg_ctl", "-D", str(self.folder / "data"), "-o", options, "-l", str(self.folder / "log"), "-w", "start")

    def stop(self) -> None:
        """Stop the server as a crash would."""
        self.run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """A server that runs for the block; skips the test where there is none to start."""
    pytest.importorskip("psycopg", reason="needs the extra `postgresql`")
    found = sorted(PACKAGES.glob("*/bin/initdb")) or [Path(one) for one in [shutil.which("initdb")] if one]
    if not found:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    # Its own user must get into the folder, which pytest's do not let it.
    with tempfile.TemporaryDirectory(prefix="qsearch-pg-") as name:
        folder = Path(name)
        if os.getuid() == 0:
            shutil.chown(folder, "postgres")
        server = Postgres(found[-1].parent, folder)
        server.create()
        server.start()
        try:
            yield server
        finally:
            server.stop()
