"""Bundles that somebody made to do harm."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qsearch.export import runner

# A library that says so when it is loaded: nothing of it needs to be called.
CODE = """#include <cstdio>
__attribute__((constructor)) static void loaded() { if (FILE *file = std::fopen("%s", "w")) std::fclose(file); }
"""


def hostile_bundle(directory: Path, mark: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> Path:
    """A bundle whose checksums are right, and whose library makes a file when it is loaded."""
    directory.mkdir()
    source = directory.parent / "code.cc"
    source.write_text(CODE % mark)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", str(directory / "model.so"), str(source)], check=True)
    for name in ("recorded_inputs.npy", "recorded_outputs.npy"):
        np.save(directory / name, np.zeros((1, 1), np.float32))
    preprocessing = {"resize": None, "crop": [4, 4], "mean": [0.5], "std": [0.5], "channels": 1}
    documents = {"preprocessing": preprocessing, "classes": ["a"], "config": {}, "metrics": {"search": {"latency": {}}}}
    for name, document in documents.items():
        (directory / f"{name}.json").write_text(json.dumps(document))
    manifest: dict[str, Any] = {
        "format": runner.FORMAT,
        "input": {"dtype": "float32", "layout": "NCHW", "shape": [1, 1, 4, 4]},
        "target": {"threads": 1, "cpu_flags": [], "description": "this", "architecture": platform.machine()},
        "metrics": {"latency_ms": 1.0},
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())},
    }
    write_manifest(directory, manifest, change)
    return directory


def write_manifest(bundle: Path, manifest: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest, make it agree with itself, and write it."""
    change(manifest)
    manifest["self_sha256"] = runner.own_digest(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
