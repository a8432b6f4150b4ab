"""Where a study's figures come from: the machine, the versions of what measured them, and the layers that were searched."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import qsearch
from qsearch.measure.processors import available_processors
from qsearch.models.graph import Graph
from qsearch.search.anchors import weight_count

__all__ = ["device_kind", "layer_facts", "machine_facts", "package_versions"]

PACKAGES = ("apache-tvm", "apache-tvm-ffi", "torch", "numpy", "optuna")


def machine_facts() -> dict[str, Any]:
    """This machine: processor, the number of them that may be used, system. No name, and nothing of its user."""
    return {"processor": _processor(), "processors": len(available_processors()), "system": platform.platform(terse=True)}


def device_kind(device: str) -> str:
    """What modules are timed on here, by the name that its maker has given to all of its kind.

    Args:
        device: 'cpu' or 'cuda'.
    """
    if device == "cpu":
        return _processor()
    import tvm

    return str(tvm.device(device, 0).device_name)


def package_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Package -> version, for qsearch itself and those of the packages that are installed."""
    found = {"qsearch": qsearch.__version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def layer_facts(graph: Graph) -> list[dict[str, Any]]:
    """The layers in the order of the network: name, type, and how many weights each has.

    A configuration's stable form sorts layers by name, so that their order has to be kept beside it.
    """
    types = graph.layer_types
    return [{"name": one.name, "type": types[one.name], "weights": weight_count(graph, one)} for one in graph.layers]


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()
