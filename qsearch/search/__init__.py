"""Search space, samplers, study and Pareto front.

The package can be called: `qsearch.search(model, data)` is `qsearch.session.api.search`. Python makes a package an attribute of
the one it lies in, so that a function of this name would be gone as soon as anything in here was imported.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any


class _CallablePackage(types.ModuleType):
    """This package as a function."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return importlib.import_module("qsearch.session.api").search(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
