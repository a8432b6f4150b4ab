"""The worker process: what it links runs here as it would have there, and it does not outlive its parent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tvm
from networks import images, network

from qsearch.build.target import open_target
from qsearch.calibrate.observe import observe
from qsearch.config import QuantConfig
from qsearch.errors import BuildError
from qsearch.search.module_builder import ModuleBuilder, open_parcel
from qsearch.search.workers import Worker

PARENT = """
import os, signal
from analytic import PassingPacker
from qsearch.config import QuantConfig
from qsearch.search.workers import Worker

class Packer(PassingPacker):
    def pack(self, config):
        return os.getpid()

print(Worker(Packer()).submit(QuantConfig()).result(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_module_linked_by_a_worker_is_the_one_linked_here(tmp_path: Path) -> None:
    model = network("residual")[0]
    builder = ModuleBuilder(model, observe(model, images(8), 4), (-1.0, 1.0), open_target("host"), tmp_path)
    config = QuantConfig(default_precision="int8")
    here = builder.prepare(config)
    worker = Worker(builder)
    try:
        parcel = worker.submit(config).result()
        sent = open_parcel(parcel)
        with pytest.raises(BuildError, match="cannot be loaded"):
            open_parcel(parcel)
    finally:
        worker.close()
    assert (sent.memory, sent.kernels_sha256) == (here.memory, here.kernels_sha256)
    assert set(sent.seconds) == {"lower", "build"}
    given = tvm.runtime.tensor(images(1))
    outputs = [prepared.open()["main"](given).numpy() for prepared in (sent, here)]
    np.testing.assert_array_equal(*outputs)
    assert list((tmp_path / "modules").iterdir()) == []


def test_a_worker_ends_with_a_parent_that_is_killed() -> None:
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    parent = subprocess.run(
        [sys.executable, "-c", PARENT], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    worker, deadline = int(parent.stdout), time.monotonic() + 60
    while _runs(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(worker), parent.stderr


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # An orphan that has ended waits to be collected where nobody collects.
    status = Path(f"/proc/{pid}/status")
    return not (status.exists() and "State:\tZ" in status.read_text())
