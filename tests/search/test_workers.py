"""The worker process: what it links runs here as it would have there, and it does not outlive its parent."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from networks import images, network

from qsearch.build.packed import PackedModule
from qsearch.build.target import open_target
from qsearch.calibrate.observe import observe
from qsearch.config import QuantConfig
from qsearch.errors import BuildError, StudyError
from qsearch.measure.accuracy import run_images
from qsearch.measure.devices.device import Prepared
from qsearch.measure.measurement import Latency
from qsearch.measure.task import ClassificationScorer
from qsearch.quantize.variants import Variants
from qsearch.search.evaluation import module_builder, requirements
from qsearch.search.evaluation.module_builder import ModuleBuilder
from qsearch.search.evaluation.module_measurer import ModuleMeasurer
from qsearch.search.loop.early_stopping import EarlyStop, StoppingRule
from qsearch.search.loop.processors import Processors
from qsearch.search.loop.workers import Worker

INT8 = QuantConfig(default_precision="int8")
PARENT = """
import os, signal
from qsearch.search.loop.workers import Worker

print(Worker(lambda: lambda packed, rule: os.getpid()).measure(None, None).result(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> ModuleBuilder:
    """Of a small network."""
    model = network("residual")[0]
    return ModuleBuilder(
        Variants(model, lambda variant: observe(variant, images(8), 4)),
        (-1.0, 1.0),
        open_target("host"),
        tmp_path_factory.mktemp("cache"),
    )


def test_a_packed_module_is_the_one_linked_here_and_its_file_is_deleted_unless_kept(
    builder: ModuleBuilder, tmp_path: Path
) -> None:
    here = builder.prepare(INT8)
    given = tvm.runtime.tensor(images(1))
    for kept, files in ((False, 0), (True, 1)):
        text = pickle.dumps(builder.pack(INT8, tmp_path, kept))
        assert len(text) < 10_000
        sent = pickle.loads(text)
        assert (sent.memory, sent.kernels_sha256) == (here.memory, here.kernels_sha256)
        assert set(sent.seconds) == {"lower", "build"}
        outputs = [prepared.open()["main"](given).numpy() for prepared in (sent, here, sent)]
        np.testing.assert_array_equal(outputs[0], outputs[1])
        np.testing.assert_array_equal(outputs[2], outputs[1])
        assert len(list(tmp_path.iterdir())) == files
    pickle.loads(text).open()
    (file,) = tmp_path.iterdir()
    file.unlink()
    with pytest.raises(BuildError, match="cannot be loaded"):
        pickle.loads(text).open()


def test_a_disk_that_fills_up_beneath_a_module_is_no_fault_of_its_configuration(
    builder: ModuleBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(module: object, file: Path, kept: bool) -> PackedModule:
        file.write_bytes(b"half a module")
        monkeypatch.setattr(requirements, "LEAST_FREE_BYTES", 1 << 60)
        return PackedModule(file, (), kept)

    monkeypatch.setattr(module_builder, "pack_module", cut_off)
    with pytest.raises(StudyError, match="the disk is full"):
        builder.pack(INT8, tmp_path)


@pytest.mark.slow
def test_a_worker_measures_what_this_process_would(builder: ModuleBuilder, tmp_path: Path) -> None:
    given, fp32 = images(40), QuantConfig(default_precision="fp32")
    logits = run_images(builder.prepare(fp32).open, given)
    reference = builder.pack(fp32, tmp_path, kept=True)
    measurer = ModuleMeasurer(reference.open, 3.0, partial(images, 40), ClassificationScorer(logits.argmax(1)), logits, 1)
    packed = builder.pack(INT8, tmp_path)
    worker = Worker(replace(measurer, processors=Processors(*map(frozenset, split()))).open)
    try:
        found = worker.measure(packed, StoppingRule({})).result()
        # More than a trial that is no slower, no larger and no less accurate, it cannot be.
        with pytest.raises(EarlyStop, match="dominated by trial 7") as stop:
            worker.measure(builder.pack(INT8, tmp_path), StoppingRule({7: (0.0, 0.0, -100.0)})).result()
        assert stop.value.bound.images == 0
    finally:
        worker.close()
    here = measurer.measure(builder.prepare(INT8))
    assert (found.accuracy, found.memory, found.kernels_sha256) == (here.accuracy, here.memory, here.kernels_sha256)
    assert found.latency.ratio is not None
    assert found.latency.median_ms == pytest.approx(3.0 * found.latency.ratio)
    assert set(found.seconds) == {"lower", "build", "latency", "accuracy"}


def split() -> tuple[set[int], set[int]]:
    """The last processor, and the others."""
    available = os.sched_getaffinity(0)
    return {max(available)}, available - {max(available)}


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


class ScriptedDevice:
    """Tells the latencies that it is given, one after the other."""

    def __init__(self, milliseconds: list[float], noisy: Collection[int] = ()) -> None:
        self.left = [Latency(one, 0.1, 21, 5, ratio=one / 3.0, noisy=n in noisy) for n, one in enumerate(milliseconds)]

    def handle(self, prepared: Prepared) -> Prepared:
        return prepared

    def paired(self, reference: Any, handles: list[Any], image: np.ndarray, reference_ms: float) -> list[Latency]:
        return [self.left.pop(0)]


@pytest.mark.parametrize(
    ("rule", "timings", "noisy", "expected"),
    [
        # Nothing is asked for: one timing.
        (None, [1.0], set(), 1.0),
        # On the front: lucky the first time, the second or never.
        (StoppingRule({}), [1.0, 2.0, 2.1], set(), 2.0),
        (StoppingRule({}), [2.0, 1.0, 2.1], set(), 2.0),
        (StoppingRule({7: (1.5, 1.0, 100.0)}), [2.0, 2.2, 2.1], set(), 2.1),
        # Where nothing is stopped too; what is dominated goes on and is timed once.
        (StoppingRule({}, stops=False), [1.0, 2.0, 2.1], set(), 2.0),
        (StoppingRule({7: (0.5, 1.0, -1.0)}, stops=False), [2.0], set(), 2.0),
        # The noisy ones do not count; of two that are left it is no faster than the slower.
        (StoppingRule({}), [1.0, 2.0, 2.1], {1}, 2.1),
        (StoppingRule({}), [1.0, 2.0, 2.1], {0, 2}, 2.0),
        (StoppingRule({}), [3.0, 2.0, 2.1], {0, 1, 2}, 2.1),
    ],
)
def test_what_reaches_the_front_is_timed_again(
    builder: ModuleBuilder, rule: StoppingRule | None, timings: list[float], noisy: set[int], expected: float
) -> None:
    given = images(6)
    logits = run_images(builder.prepare(QuantConfig(default_precision="fp32")).open, given)
    device = ScriptedDevice(timings, noisy)
    scorer = ClassificationScorer(logits.argmax(1))
    measurer = ModuleMeasurer(lambda: None, 3.0, lambda: given, scorer, logits, 1, device=device)  # type: ignore[arg-type]
    found = measurer.measure(builder.prepare(INT8), rule)
    assert found.latency.median_ms == expected and not device.left
    assert found.latency.ratio == pytest.approx(expected / 3.0)


def test_what_is_dominated_by_the_last_of_its_images_is_timed_once(builder: ModuleBuilder) -> None:
    given = images(6)
    logits = run_images(builder.prepare(QuantConfig(default_precision="fp32")).open, given)
    # Wrong for the module whatever it answers, so that it loses nothing; another loses as little in less time.
    scorer = ClassificationScorer(np.full(6, -1))
    device = ScriptedDevice([2.0])
    measurer = ModuleMeasurer(lambda: None, 3.0, lambda: given, scorer, logits, 1, device=device)  # type: ignore[arg-type]
    found = measurer.measure(builder.prepare(INT8), StoppingRule({7: (1.0, 1.0, 0.0)}))
    assert found.accuracy.top1_loss_pp == 0.0 and found.latency.median_ms == 2.0
