"""Versions of a bundle: a new one takes the old one's place at once, and the old one's name is kept for the way back.

Version n of BUNDLE that was replaced lies beside it, as BUNDLE.vn, whole and unchanged. The new version is written under
that very name and exchanged with the bundle in one step of the file system, so that there is a whole bundle under either
name at any time, whatever stops the process.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qsearch.adapt.propose import Scales
from qsearch.bounded import read_json
from qsearch.calibrate.drift import DriftReference
from qsearch.errors import BundleCorruptError, BundleError, TargetMismatchError
from qsearch.export import rescale, runner
from qsearch.export.bundle_seal import has_own_seal, require_own_bundle, seal_bundle
from qsearch.seal import SEAL
from qsearch.whole_files import put_in_place, remove_strays, scratch_name, sync_folder

__all__ = ["read_bundle", "replace_version", "rollback", "version_of", "write_version"]

REMARK = "its scales were replaced after that: latency is as measured, accuracy is not that of this version"
# Of renameat2: swap two names.
_EXCHANGE, _HERE = 2, -100


def version_of(manifest: dict[str, Any]) -> int:
    """Number of a bundle's version; 1 as exported."""
    return int(manifest.get("version", 1))


def read_bundle(bundle: Path, trust: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Manifest and record of scales of a bundle, every file checked.

    Args:
        bundle: The bundle.
        trust: Whether it may be somebody else's.

    Raises:
        UntrustedError: It is somebody else's.
        BundleCorruptError: It is no bundle, was changed, or has no record of scales.
        TargetMismatchError: It is for another machine.
    """
    try:
        manifest = runner.read_manifest(bundle)
        if manifest["target"].get("arch"):
            raise TargetMismatchError(
                f"{bundle} is for a GPU, {manifest['target']['arch']}: scales are replaced in bundles for CPUs only"
            )
        runner.check_machine(manifest)
        require_own_bundle(bundle, manifest, trust)
        return manifest, rescale.read_record(bundle / rescale.RECORD)
    except (runner.BundleProblem, rescale.ScaleProblem) as problem:
        wrong = getattr(problem, "status", 1) == runner.WRONG_MACHINE
        raise (TargetMismatchError if wrong else BundleCorruptError)(str(problem)) from None


def write_version(
    bundle: Path, manifest: dict[str, Any], record: dict[str, Any], made: tuple[bytes, np.ndarray], facts: dict[str, Any]
) -> Path:
    """Write a new version of a bundle beside it, where the old one will be.

    Args:
        bundle: The old version.
        manifest: Its manifest.
        record: The new version's record of scales.
        made: The new module's bytes, and what it gives for the recorded inputs.
        facts: What the metrics say of the change.

    Returns:
        Where it is, until it is exchanged with the bundle.

    Raises:
        BundleError: It cannot be written, or another version lies there.
    """
    bundle, number = bundle.absolute(), version_of(manifest)
    place = _beside(bundle, number)
    if place.exists() and _version_at(place) == number:
        raise BundleError(f"{place} holds version {number} already, which {bundle.name} is; move it away")
    others = [_version_at(path) for path in bundle.parent.glob(f"{bundle.name}.v*")]
    copy, stale = scratch_name(place), scratch_name(place)
    try:
        remove_strays(place)
        shutil.copytree(bundle, copy)
        _fill(copy, record, made, facts)
        names = ("model.so", "recorded_outputs.npy", "metrics.json", rescale.RECORD)
        told = {
            "version": 1 + max([number, *others]),
            "adapted_from": {"version": number, "self_sha256": manifest["self_sha256"]},
        }
        _write_manifest(copy, manifest | told, names)
        (copy / SEAL).unlink(missing_ok=True)
        if has_own_seal(bundle, manifest):
            # One that was trusted unasked stays somebody else's: its kernels are.
            seal_bundle(copy)
        if place.exists():
            # A version that was never put in its place, or came back from there.
            os.replace(place, stale)
        put_in_place(copy, place)
    except OSError as error:
        raise BundleError(f"cannot write a new version of {bundle}: {error.strerror or error}; it is as it was") from error
    finally:
        for scratch in (copy, stale):
            shutil.rmtree(scratch, ignore_errors=True)
    return place


def _fill(copy: Path, record: dict[str, Any], made: tuple[bytes, np.ndarray], facts: dict[str, Any]) -> None:
    (copy / "model.so").write_bytes(made[0])
    np.save(copy / "recorded_outputs.npy", np.ascontiguousarray(made[1]), allow_pickle=False)
    rescale.write_record(copy / rescale.RECORD, record)
    metrics = json.loads((copy / "metrics.json").read_text(encoding="utf-8"))
    remarks = [metrics["remark"]] if metrics.get("remark") else []
    metrics |= {"adapted": facts, "remark": "; ".join(dict.fromkeys([*remarks, REMARK]))}
    _write_json(copy / "metrics.json", metrics)


def _write_manifest(copy: Path, manifest: dict[str, Any], names: Sequence[str]) -> None:
    digests = {name: hashlib.sha256((copy / name).read_bytes()).hexdigest() for name in names}
    made = manifest | {"sha256": manifest["sha256"] | digests, "metrics": manifest["metrics"] | {"remark": REMARK}}
    _write_json(copy / "manifest.json", made | {"self_sha256": runner.own_digest(made)})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def new_record(record: dict[str, Any], scales: Scales, reference: DriftReference) -> dict[str, Any]:
    """The record of a module with other scales, which later statistics are compared with another reference of."""
    values = [value | {"scale": scale, "zero_point": zero} for value, (scale, zero) in zip(record["values"], scales, strict=True)]
    arrays = {"counts": np.minimum(reference.counts, 2**32 - 1).astype(np.uint32), "noise": reference.noise.astype(np.float32)}
    facts = {"images": reference.images, "alarm": reference.alarm}
    return record | {"values": values, "reference": facts, "arrays": record["arrays"] | arrays}


def replace_version(bundle: Path, place: Path) -> None:
    """Exchange a bundle with the version that was written beside it.

    Raises:
        BundleError: The file system cannot.
    """
    _exchange(place, bundle.absolute())


def rollback(bundle: Path) -> tuple[int, int]:
    """Put the version back that a bundle was made from; no code of either is run, whoever made them.

    Returns:
        The versions that the bundle was and is.

    Raises:
        BundleError: It was made from none, or that is not beside it.
        BundleCorruptError: Either was changed.
    """
    bundle = bundle.absolute()
    manifest, _ = read_bundle(bundle, trust=True)
    origin = manifest.get("adapted_from")
    if origin is None:
        raise BundleError(f"{bundle.name} is as it was exported: there is no version to go back to")
    if not isinstance(origin, dict) or not isinstance(origin.get("version"), int):
        raise BundleCorruptError(f"{bundle}/manifest.json is damaged: adapted_from has no version")
    place = _beside(bundle, origin["version"])
    if not place.exists():
        raise BundleError(f"version {origin['version']} of {bundle.name} is not beside it: {place} is missing")
    found, _ = read_bundle(place, trust=True)
    if found["self_sha256"] != origin.get("self_sha256"):
        raise BundleError(f"{place} is not what version {version_of(manifest)} of {bundle.name} was made from: it is left alone")
    _exchange(place, bundle)
    aside = _beside(bundle, version_of(manifest))
    if not aside.exists():
        put_in_place(place, aside)
    return version_of(manifest), version_of(found)


def _beside(bundle: Path, number: int) -> Path:
    return bundle.with_name(f"{bundle.name}.v{number}")


def _version_at(path: Path) -> int:
    """Version of what lies there; 0 where that is no bundle."""
    try:
        return version_of(read_json(path / "manifest.json"))
    except (OSError, ValueError, AttributeError, TypeError):
        return 0


def _exchange(first: Path, second: Path) -> None:
    """Swap two names in one step."""
    library = ctypes.CDLL(None, use_errno=True)
    swap = getattr(library, "renameat2", None)
    code = errno.ENOSYS if swap is None else 0
    if swap is not None and swap(_HERE, os.fsencode(first), _HERE, os.fsencode(second), ctypes.c_uint(_EXCHANGE)) != 0:
        code = ctypes.get_errno()
    if code:
        raise BundleError(
            f"this file system cannot exchange {first} and {second} in one step ({os.strerror(code)}): both are whole; exchange "
            "them by hand, or keep bundles on another file system"
        )
    sync_folder(first.parent)
