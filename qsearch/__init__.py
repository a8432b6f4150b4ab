"""qsearch: search per-layer quantization of a vision model over measured, compiled modules.

    import qsearch
    study = qsearch.search("demo", budget=50)
    study.front, study.plot(), study.export("knee", "bundle")

Importing the package loads nothing else: torch, TVM and Optuna are loaded when one of its names is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qsearch.config import QuantConfig
    from qsearch.errors import QSearchError
    from qsearch.session.api import search
    from qsearch.session.study import Point, Study, open_study

__version__ = "0.1.0"
__all__ = ["Point", "QSearchError", "QuantConfig", "Study", "open_study", "search"]

_HOMES = {
    "Point": "qsearch.session.study",
    "QSearchError": "qsearch.errors",
    "QuantConfig": "qsearch.config",
    "Study": "qsearch.session.study",
    "open_study": "qsearch.session.study",
}


def __getattr__(name: str) -> Any:
    if name == "search":
        # The room of that name, which can be called: a function would be replaced by it at the first import of the room.
        return importlib.import_module("qsearch.search")
    if name not in _HOMES:
        raise AttributeError(f"module 'qsearch' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
