"""Shared by all tests, and the reason that `tests/` is on the import path: one real search, killed once on its way."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt_bundles import write_dark_bundle
from real_search import RealSearch, search_small, search_with_a_kill, within

# Files that look at the real search: one process has them all, as it takes minutes to make.
REAL = (
    *("tests/commands/test_compare.py", "tests/commands/test_real_search.py"),
    *("tests/export/test_bundle.py", "tests/export/test_cpp_runner.py"),
)
STATE = pytest.StashKey[str]()
# What takes longest for one process, first: the other has the rest to itself meanwhile.
LONGEST = (*REAL, "tests/commands/", "tests/search/", "tests/export/", "tests/measure/")


def pytest_configure(config: pytest.Config) -> None:
    """Keep torch to one thread where each of several processes tests on a processor of its own; seal with a key of the run's."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        # For processes that tests start; torch, loaded by the imports above, has read it already.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    else:
        # Processes that tests start, and those that share them, inherit it.
        config.stash[STATE] = os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="qsearch-state-")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Forget the key."""
    if STATE in config.stash:
        shutil.rmtree(config.stash[STATE], ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to one process, as fixtures are made per file."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "real" if file in REAL else file

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first."""
    for item in items:
        if "real" in getattr(item, "fixturenames", ()) and _file(item) not in REAL:
            raise pytest.UsageError(f"{_file(item)} looks at the real search: name it in REAL, in tests/conftest.py")
    items.sort(key=lambda item: next((i for i, name in enumerate(LONGEST) if _file(item).startswith(name)), len(LONGEST)))


def _file(item: pytest.Item) -> str:
    return item.path.relative_to(item.config.rootpath).as_posix()


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealSearch:
    """The demo model searched for a few trials by processes, the first of which was killed."""
    return search_with_a_kill(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="session")
def bundles(real: RealSearch) -> list[Path]:
    """Every point of its front as a bundle."""
    result = within(real.folder, "export", "--study", "real", "--all", "--out", "bundles", "--json")
    assert result.returncode == 0, result.stderr
    return [real.folder / row["bundle"] for row in json.loads(result.stdout)["bundles"]]


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study of the smallest network."""
    return search_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def dark_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that was calibrated on dark pictures; not to be changed."""
    folder = tmp_path_factory.mktemp("dark")
    return write_dark_bundle(folder / "bundle", folder / "kernels")
