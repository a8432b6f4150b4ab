"""A full disk and a folder that cannot be written: one sentence, nothing half-written, and the same again once there is room."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from real_search import SMALL, within

from qsearch import whole_files
from qsearch.config import QuantConfig
from qsearch.data.image_file import write_images
from qsearch.errors import BundleError, StudyError, UsageError
from qsearch.export import bundle as bundle_module
from qsearch.export.bundle import BundleContent, write_bundle
from qsearch.measure.kernel_times import KernelTimes
from qsearch.qat.checkpoint import Checkpoint, CheckpointFolder, Epoch
from qsearch.quantize.rounding.rounding_file import save_rounding
from qsearch.quantize.weights import QuantizedWeight
from qsearch.report import page_file
from qsearch.report.figures import write_figures


def rounding(folder: Path) -> None:
    save_rounding(QuantizedWeight(np.zeros((2, 3), np.int8), np.ones(2, np.float32)), folder / "a.npz")


def checkpoint(folder: Path) -> None:
    CheckpointFolder(folder, {}).save(Checkpoint({"w": torch.ones(2)}, (Epoch(None, 1.0, 1.0),)))


def bundle(folder: Path) -> None:
    content = BundleContent(QuantConfig(), {}, (), {}, np.zeros(1), np.zeros(1))
    with mock.patch.object(bundle_module, "_fill", lambda made, *_: (made / "manifest.json").write_text("{}")):
        write_bundle(folder / "b", None, None, content)  # type: ignore[arg-type]


def page(folder: Path) -> None:
    with mock.patch.object(page_file, "page_text", lambda document: "<html>"):
        page_file.write_page({}, folder / "report.html")


def figures(folder: Path) -> None:
    from qsearch.report import figures as module

    one = module._Figure("history", lambda: Image.new("RGB", (4, 4)), [{"trial": 1}])
    with mock.patch.object(module, "_figures", lambda document: [one]):
        write_figures({}, folder)


def images(folder: Path) -> None:
    write_images(folder / "images-a.npy", (1, 1, 2, 2), np.zeros((1, 1, 2, 2), np.float32))


def times(folder: Path) -> None:
    KernelTimes(folder).put({"qs_a": 0.5})


# What writes -> what it raises; the command line tells what to do of an OSError.
WRITERS: dict[Callable[[Path], None], type[Exception]] = {
    rounding: StudyError,
    checkpoint: StudyError,
    bundle: BundleError,
    page: UsageError,
    figures: UsageError,
    images: OSError,
    times: OSError,
}
# Images and times of kernels are not waited for.
CASES = [(write, "replace") for write in WRITERS] + [(write, "fsync") for write in WRITERS if write not in (images, times)]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize(("write", "operation"), CASES, ids=lambda one: one if isinstance(one, str) else one.__name__)
def test_what_cannot_be_written_is_said_and_written_later(
    write: Callable[[Path], None], operation: str, code: int, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with mock.patch.object(whole_files.os, operation, fail), pytest.raises(WRITERS[write]) as caught:
        write(tmp_path)
    assert os.strerror(code) in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    write(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def disk(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a finished study on a disk of its own."""
    place = tmp_path_factory.mktemp("disk")
    mounting = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    shutil.copytree(small, place / "work")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place: Path, how: str) -> None:
    # What earlier commands, which ran in this process, have left open.
    gc.collect()
    subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True)


MODEL = SMALL[1:5]
# Every command that writes, and what it writes beside caches and studies.
COMMANDS = {
    "search": ((*SMALL, "--budget", "6", "--jobs", "1"), ()),
    "tables": (("tables", *MODEL, "--plot", "tables.png"), ("tables.png",)),
    "report": (("report", "--study", "small", "--out", "report.html", "--figures", "figures"), ("report.html",)),
    "evaluate": (("evaluate", *MODEL, "--precision", "int16"), ()),
    # For another target than the study's, which other tiles would end.
    "tune": (("tune", *MODEL, "--target", "portable", "--precision", "int8", "--seconds", "1"), ()),
    "export": (("export", "--study", "small", "--out", "bundle"), ("bundle",)),
    "export as pt2": (("export", "--study", "small", "--out", "x.pt2", "--format", "pt2"), ("x.pt2",)),
    "diagnose": (("diagnose", "--study", "small", "--trial", "0", "--plot", "d.png", "--seconds", "1"), ("d.png",)),
    "finetune": (("finetune", *MODEL, "--config", "int8", "--train", "data", "--epochs", "1", "--out", "tuned"), ("tuned",)),
    "pack": (("pack", *MODEL, "--out", "k.pack"), ("k.pack",)),
    "cache": (("cache", "--folder", "studies/cache", "--prune", "--max-bytes", "1000"), ()),
}


# Before the cache is pruned: a disk on which a loaded library was removed cannot be made read-only.
@pytest.mark.slow
def test_commands_that_only_read_say_what_is_wrong_with_the_disk(disk: Path) -> None:
    remount(disk, "ro")
    try:
        for command in (("front", "--study", "small"), ("status", "--study", "small")):
            found = within(disk / "work", *command)
            assert found.returncode == 0 or "cannot be written" in found.stderr, found.stderr
            assert "Traceback" not in found.stderr
    finally:
        remount(disk, "rw")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("state", ["full", "read-only"])
def test_commands(disk: Path, name: str, state: str) -> None:
    if (name, state) == ("cache", "full"):
        pytest.skip("makes room, and so it may")
    command, files = COMMANDS[name]
    work, filler = disk / "work", disk / "filler"
    for file in files:
        # Of the state before.
        shutil.rmtree(work / file) if (work / file).is_dir() else (work / file).unlink(missing_ok=True)
    before = {path.relative_to(work) for path in work.rglob("*")}
    if state == "full":
        with filler.open("wb", buffering=0) as stream, pytest.raises(OSError, match="No space left"):
            while True:
                stream.write(bytes(1 << 16))
    else:
        remount(disk, "ro")
    try:
        refused = within(work, *command)
    finally:
        filler.unlink() if state == "full" else remount(disk, "rw")
    assert refused.returncode in (1, 2), (refused.stdout, refused.stderr)
    (message,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert any(word in message.lower() for word in ("full", "no space", "read-only", "cannot be written")), message
    assert not any((work / file).exists() for file in files)
    left = {path.relative_to(work) for path in work.rglob(".*")} - before
    assert not [path for path in left if path.name != ".lock"], left
    again = within(work, *command)
    # Whether a network of noise gains by training is not at issue.
    assert again.returncode == 0 or name == "finetune", again.stderr
    assert all((work / file).exists() for file in files if again.returncode == 0)
