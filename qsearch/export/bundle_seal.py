"""The seal of a bundle: a file beside its manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qsearch.bounded import read_file
from qsearch.export import runner
from qsearch.seal import SEAL, is_own, require_own, seal_of

__all__ = ["has_own_seal", "require_own_bundle", "seal_bundle"]

_KIND = "bundle"
_MOST_BYTES = 1024


def seal_bundle(directory: Path) -> None:
    """Say that this user has made a bundle, whose manifest was just written here; not where no key can be kept."""
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    seal = seal_of(_KIND, runner.own_digest(manifest))
    if seal is not None:
        (directory / SEAL).write_text(f"{seal}\n", encoding="ascii")


def has_own_seal(directory: Path, manifest: dict[str, Any]) -> bool:
    """Whether this user has made a bundle."""
    return is_own(_KIND, runner.own_digest(manifest), _found(directory))


def require_own_bundle(directory: Path, manifest: dict[str, Any], trust: bool) -> None:
    """Refuse to run the code of a bundle that this user has not made.

    Args:
        directory: The bundle.
        manifest: Its manifest, every file checked.
        trust: Run it all the same.

    Raises:
        UntrustedError: It is somebody else's.
    """
    require_own(str(directory), _KIND, runner.own_digest(manifest), _found(directory), trust)


def _found(directory: Path) -> str:
    try:
        return read_file(directory / SEAL, _MOST_BYTES).decode("ascii", "replace").strip()
    except (OSError, ValueError):
        return ""
