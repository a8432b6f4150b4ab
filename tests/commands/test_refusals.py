"""Bad input on the command line: an exit code, one message that names the thing and the way out, nothing written."""

from __future__ import annotations

import csv
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_folders import write_classes
from real_search import SMALL, command, completed, fails, refused

from qsearch.build import target


def table(root: Path, labels: list[int]) -> Path:
    """A directory of images with a labels.csv."""
    write_classes(root, classes="ab")
    names = [f"{letter}/{index:02d}.png" for letter in "ab" for index in range(12)]
    with (root / "labels.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("path", "label"), *zip(names, labels, strict=True)])
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good images and every kind of bad ones."""
    root = tmp_path_factory.mktemp("bad")
    write_classes(root / "good")
    (root / "empty").mkdir()
    write_classes(root / "one_class", classes="a")
    write_classes(root / "grey", "L")
    write_classes(root / "small", size=(8, 8))
    write_classes(root / "three", classes="abc")
    write_classes(root / "truncated")
    damaged = root / "truncated" / "a" / "03.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    write_classes(root / "junk")
    (root / "junk" / "a" / "03.png").write_bytes(b"hello")
    table(root / "out_of_range", [0] * 12 + [1] * 11 + [7])
    table(root / "negative", [0] * 12 + [1] * 11 + [-1])
    return root


@pytest.mark.parametrize(
    "data, words",
    [
        ("nowhere", ("nowhere", "does not exist", "labels.csv")),
        ("good/a/00.png", ("is not a directory",)),
        ("empty", ("neither labels.csv nor class folders",)),
        ("one_class", ("one_class/a", "at least two classes")),
        ("truncated", ("truncated/a/03.png", "not a readable image", "replace or remove")),
        ("junk", ("junk/a/03.png", "not a readable image")),
        ("grey", ("1 channel (grey)", "--convert-channels")),
        ("small", ("8x8", "16x16")),
        ("three", ("three/c/00.png", "label 'c'", "2 outputs")),
        ("out_of_range", ("out_of_range/b/11.png", "label '7' is out of range", "0 to 1")),
        ("negative", ("line 25", "label -1 is out of range")),
    ],
)
def test_images(folder: Path, data: str, words: tuple[str, ...]) -> None:
    fails(folder, 2, words, "evaluate", "--model", "broken_networks:Net", "--data", data)


@pytest.mark.parametrize(
    "name, code, words",
    [
        ("TwoInputs", 2, ("takes one image tensor",)),
        ("ControlFlow", 2, ("no data-dependent control flow",)),
        ("NotAClassifier", 2, ("(1, 8, 16, 16)", "(batch, classes)")),
        ("TwoOutputs", 2, ("returns 2 tensors", "logits alone")),
        ("ClassIndex", 2, ("argmax", "must be float32")),
        ("NoBatch", 2, ("returns shape (2,)",)),
        ("Complex", 2, ("fft", "must be float32")),
        ("half_precision", 2, ("Half",)),
        ("Sorted", 2, ("fails in float already", "aten.sort")),
        ("nan_weight", 2, ("second.weight holds 1 NaN", "repair")),
        ("overflow", 1, ("infinity at node 'second'", "repair")),
        ("Logarithm", 1, ("NaN at node 'log'", "repair")),
        ("NoLayers", 2, ("no convolution and no linear layer",)),
        ("raises", 2, ("cannot be built", "the weights are elsewhere")),
        ("exits", 2, ("cannot be built", "SystemExit")),
        ("not_a_module", 2, ("returned int", "torch.nn.Module")),
        ("a_class", 2, ("returned type", "torch.nn.Module")),
        ("missing", 2, ("no attribute 'missing'",)),
    ],
)
def test_models(folder: Path, name: str, code: int, words: tuple[str, ...]) -> None:
    model = f"broken_networks:{name}"
    fails(folder, code, words, "search", "--model", model, "--data", "good", "--budget", "1")
    assert not list(folder.glob("studies/*.db"))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--model", "demoo"), ("'demo'",)),
        (("--model", "nowhere_at_all:Net"), ("no Python module 'nowhere_at_all'", "PYTHONPATH")),
        (("--model", "nowhere.pt2"), ("nowhere.pt2 does not exist",)),
        (("--model", "torchvision:resnet"), ("resnet18",)),
        (("--weights", "nowhere.pth"), ("nowhere.pth does not exist",)),
        (("--data", "good"), ("'a' is not one of the model's 10 classes",)),
        (("--model", "broken_networks:Net"), ("brings no images", "--data")),
        (("--target", "pentium9"), ("'pentium9'", "portable")),
        (("--precision", "int8,fp16"), ("'fp16'", "features.0.0", "'host'", "use --target cuda, or leave fp16 out")),
        (("--preprocessing", "nowhere.json"), ("nowhere.json",)),
    ],
)
def test_options(folder: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    fails(folder, 2, words, "evaluate", *arguments)


def test_a_bad_image_held_out_is_met_before_the_search(tmp_path: Path) -> None:
    labels = write_classes(tmp_path / "data")
    names = [f"{letter}/{index:02d}.png" for letter in "ab" for index in range(12)]
    with (labels / "labels.csv").open("w", newline="") as stream:
        rows = [(name, int(name[0] == "b"), "heldout" if name > "b/05" else "search") for name in names]
        csv.writer(stream).writerows([("path", "label", "split"), *rows])
    (labels / "b" / "07.png").write_bytes(b"hello")
    options = ("--model", "broken_networks:Net", "--data", "data", "--budget", "1")
    fails(tmp_path, 2, ("b/07.png", "not a readable image"), "search", *options)
    assert not list(tmp_path.glob("studies/*.db"))


def test_a_target_that_this_machine_lacks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "host_flags", lambda: frozenset({"sse4_2"}))
    fails(folder, 2, ("'x86-64-v3'", "avx2", "portable"), "evaluate", "--target", "x86-64-v3")
    fails(folder, 2, ("'aarch64:neoverse-n1'", "portable"), "evaluate", "--target", "aarch64:neoverse-n1")


def test_threads(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    fails(small, 2, ("3 threads", "2 processors"), *SMALL, "--threads", "3")
    fails(small, 1, ("target was", "1 thread)", "2 threads)", "--study"), *SMALL, "--threads", "2")


@pytest.mark.parametrize(
    "text, words",
    [
        ("version: 1\nname: x\nprecisions: {default: [fp32]}\ncalibratoin: {modes: [max]}\n", ("line 4", "'calibratoin'")),
        ("version: 1\nname: x\nprecisions: {default: [fp32, int7]}\n", ("line 3", "'int7'")),
        ("version: 1\nname: x\nprecisions: {default: [int8], layers: {nothing.*: [fp32]}}\n", ("'nothing.*' matches no layer",)),
        ("[1, 2\n", ("line 2", "not valid YAML")),
        (None, ("no search space", "default")),
    ],
)
def test_spaces(folder: Path, text: str | None, words: tuple[str, ...]) -> None:
    if text is not None:
        (folder / "space.yaml").write_text(text)
    model = ("--model", "broken_networks:Net", "--data", "good", "--space", "nowhere.yaml" if text is None else "space.yaml")
    fails(folder, 2, ("nowhere.yaml" if text is None else "space.yaml", *words), "search", *model, "--budget", "1")
    assert not list(folder.glob("studies/*.db"))


@pytest.mark.parametrize(
    "storage, code, words",
    [
        ("foo", 2, ("not a database URL",)),
        ("sqlite:////", 2, ("is a directory",)),
        ("postgresql+pg8000://u:secret@h/d", 1, ("pg8000",)),
    ],
)
def test_storages(folder: Path, storage: str, code: int, words: tuple[str, ...]) -> None:
    fails(folder, code, words, "front", "--study", "x", "--storage", storage)


def test_a_nearly_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    fails(folder, 1, ("disk is full", "1.0 MB", "nothing that was finished is lost"), "evaluate")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    # A file in the way refuses root, too, whom permissions do not.
    (tmp_path / "studies").write_text("")
    fails(tmp_path, 1, ("cannot write the cache studies/cache", "another folder"), "evaluate")
    assert (tmp_path / "studies").read_text() == ""


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a few hundred kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_under_the_database(folder: Path, tiny_disk: Path, tmp_path: Path) -> None:
    options = ("search", "--model", "broken_networks:Net", "--data", str(folder / "good"), "--study", "s", "--budget", "6")
    options += ("--storage", f"sqlite:///{tiny_disk}/s.db", "--json")
    refused(command(tmp_path, *options), 1, "the disk is full", "same command again")
    subprocess.run(["mount", "-o", "remount,size=20m", str(tiny_disk)], check=True)
    (tmp_path / "studies").mkdir(exist_ok=True)
    (tmp_path / "studies" / "s.db").symlink_to(tiny_disk / "s.db")
    before = completed(tmp_path, "s")
    again = command(tmp_path, *options)
    assert again.returncode == 0, again.stderr
    after = completed(tmp_path, "s")
    assert before.items() <= after.items()
    assert len(set(after.values())) == len(after)
