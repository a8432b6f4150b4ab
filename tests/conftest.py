"""Shared by all tests, and the reason that `tests/` is on the import path: one real search, killed once on its way."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from examples import THOROUGH
from real_search import RealSearch, search_small, search_with_a_kill, within

# What takes longest for one process, first: the other has the rest to itself meanwhile.
LONGEST = ("real", "tests/commands", "tests/export", "tests/search", "tests/measure")


def pytest_configure(config: pytest.Config) -> None:
    """Keep torch to one thread where each of several processes tests on a processor of its own; say if the run is thorough."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if "not slow" not in config.option.markexpr:
        os.environ[THOROUGH] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each file to one process, as fixtures are made per file, and all that looks at the real search to one."""
    groups = {item: _group(item) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: min((places[name] for name in LONGEST if groups[item].startswith(name)), default=len(LONGEST)))


def _group(item: pytest.Item) -> str:
    shared = "real" in getattr(item, "fixturenames", ())
    return "real" if shared else item.path.relative_to(item.config.rootpath).as_posix()


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
