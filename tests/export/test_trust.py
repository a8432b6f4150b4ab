"""A bundle of somebody else runs no code unasked, however right its checksums are."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_bundles import hostile_bundle, write_manifest
from PIL import Image
from real_search import command, fails, refused

from qsearch.errors import BundleCorruptError, BundleError, UntrustedError
from qsearch.export import runner
from qsearch.export.bundle_seal import seal_bundle
from qsearch.export.verify import predict_images, verify_bundle
from qsearch.session.compared import open_compared

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that makes the file `loaded` beside it when its library is loaded; not to be changed."""
    folder = tmp_path_factory.mktemp("hostile")
    return hostile_bundle(folder / "bundle", folder / "loaded")


@pytest.fixture
def copy(hostile: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hostile, tmp_path / "bundle"))


def test_code_is_run_when_trusted_only_and_after_its_checksums(hostile: Path, copy: Path) -> None:
    loaded, images = hostile.parent / "loaded", np.zeros((1, 1, 4, 4), np.float32)
    for run in (verify_bundle, lambda bundle: predict_images(bundle, images)):
        with pytest.raises(UntrustedError, match="is code, which runs with all your rights.*--trust"):
            run(copy)
    seal_bundle(copy)
    with (copy / "model.so").open("ab") as file:
        file.write(b"more")
    for trust in (False, True):
        with pytest.raises(BundleCorruptError, match="model.so was changed"):
            verify_bundle(copy, trust)
    assert not loaded.exists()
    # It is no module, but that is found out by loading it.
    with pytest.raises(BundleError, match="cannot be run"):
        verify_bundle(hostile, trust=True)
    assert loaded.exists()
    loaded.unlink()


def test_on_the_command_line(copy: Path, hostile: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(copy.parent / "a.png")
    words = ("bundle was not made by this user", "--trust runs it")
    fails(copy.parent, 2, words, "verify", "bundle")
    fails(copy.parent, 2, words, "run", "bundle", "a.png")
    (copy.parent / "stats.npz").write_bytes(b"none")
    fails(copy.parent, 2, words, "adapt", "bundle", "--stats", "stats.npz")
    assert not (hostile.parent / "loaded").exists()
    refused(command(copy.parent, "verify", "bundle", "--trust"), 1, "cannot be run")
    assert (hostile.parent / "loaded").exists()
    (hostile.parent / "loaded").unlink()


def _set(path: str, value: Any) -> Any:
    def change(manifest: dict[str, Any]) -> None:
        *way, last = path.split("/")
        for name in way:
            manifest = manifest[name]
        manifest[last] = value

    return change


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "a\nb", "~", "\ud800"])
def test_names_that_lead_elsewhere(copy: Path, name: str) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    write_manifest(copy, manifest, lambda given: given["sha256"].update({name: "0" * 64}))
    with pytest.raises(BundleCorruptError, match="which is no name of a file beside it"):
        verify_bundle(copy, trust=True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("target", None),
        ("target/threads", "1"),
        ("target/threads", 0),
        ("target/cpu_flags", 3),
        ("target/description", 3),
        ("input", []),
        ("input/shape", [1, -1]),
        ("input/shape", [1.5]),
        ("sha256", ["model.so"]),
        ("sha256/model.so", None),
        ("version", "2/../../elsewhere"),
    ],
)
def test_manifests_that_say_something_odd(copy: Path, path: str, value: Any) -> None:
    write_manifest(copy, json.loads((copy / "manifest.json").read_text()), _set(path, value))
    with pytest.raises(BundleCorruptError, match="manifest.json is damaged"):
        verify_bundle(copy, trust=True)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "null", '{"sha256": {}, "format": 2}', '{"format": {"a": 1}}', "\ud800"])
def test_manifests_that_are_none(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(BundleCorruptError):
        verify_bundle(copy, trust=True)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
@pytest.mark.parametrize("name", ["manifest.json", "model.so", "preprocessing.json"])
def test_what_is_no_file(copy: Path, name: str, kind: str) -> None:
    path = copy / name
    content = path.read_bytes()
    path.unlink()
    if kind == "link":
        (copy.parent / "elsewhere").write_bytes(content)
        path.symlink_to(copy.parent / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(BundleCorruptError, match=f"{name} is a link, no file, or larger"):
        verify_bundle(copy, trust=True)


def test_a_bundle_is_compared_without_its_code(copy: Path, hostile: Path) -> None:
    with pytest.raises(BundleCorruptError, match="is damaged"):
        open_compared(str(copy))
    assert not (hostile.parent / "loaded").exists()


def test_the_seal_is_of_the_manifest(copy: Path) -> None:
    seal_bundle(copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    assert set(runner.read_manifest(copy)["sha256"]) == set(manifest["sha256"]) and "seal" not in manifest["sha256"]
    write_manifest(copy, manifest, _set("target/description", "that"))
    with pytest.raises(UntrustedError, match="its seal is not this user's"):
        verify_bundle(copy)
