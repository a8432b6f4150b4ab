"""Packs of small networks, and packs that somebody has tampered with."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from networks import network, ranges_of

from qsearch.build.link import Linker
from qsearch.build.object_cache import ObjectCache
from qsearch.build.target import open_target
from qsearch.config import QuantConfig
from qsearch.measure.devices.pack import PackRequest, write_pack
from qsearch.quantize.lower import lower
from qsearch.quantize.program import Program
from qsearch.quantize.weight_store import WeightStore

# Runs a pack as Python would, where only NumPy and TVM are installed: TVM itself imports torch if there is one.
RUN = """
import runpy, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "qsearch", "optuna", "PIL", "scipy", "typer"}:
            raise ImportError(name + " is not installed")

sys.meta_path.insert(0, Missing())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def programs(name: str, *precisions: str) -> list[Program]:
    """A network in several precisions."""
    model, _ = network(name)
    ranges = ranges_of(model, QuantConfig())
    return [lower(model, QuantConfig(default_precision=one), ranges, WeightStore()) for one in precisions]


def make_pack(folder: Path, found: list[Program], target: str = "host", tiles: int = 1) -> Path:
    """A pack of some programs' kernels."""
    file = folder / "kernels.pack"
    linker = Linker(ObjectCache(folder / "kernels", open_target(target)))
    write_pack(PackRequest("small", linker, found, tiles), file)
    return file


def run_pack(file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a pack in a process that sees nothing of this project."""
    command = [sys.executable, "-I", "-c", RUN, str(file), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=file.parent)


def changed_pack(file: Path, out: Path, change: Callable[[dict, dict[str, bytes]], None], sealed: bool = True) -> Path:
    """A pack after somebody has changed its manifest and its members; sealed: the digests are made to agree again."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(members.pop("manifest.json"))
    change(manifest, members)
    if sealed:
        manifest["sha256"] = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
        del manifest["self_sha256"]
        manifest["self_sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr("manifest.json", json.dumps(manifest))
    return out
