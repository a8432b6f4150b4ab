"""CPUs that between them have every instruction set, and which of them this machine can run."""

from __future__ import annotations

from typing import Any

import pytest

from qsearch.build.target import open_target, require_runnable
from qsearch.errors import UsageError

OTHER_CPUS = ("cascadelake", "skylake-avx512", "alderlake", "haswell")
AARCH64_CPUS = ("aarch64:neoverse-v1", "aarch64:neoverse-n1", "aarch64:generic")


def runnable(name: str, *marks: pytest.MarkDecorator) -> Any:
    """A target as a test's parameter, skipped where this machine cannot run it."""
    try:
        require_runnable(open_target(name))
    except UsageError as reason:
        return pytest.param(name, marks=[*marks, pytest.mark.skip(reason=str(reason))])
    return pytest.param(name, marks=marks)
