"""Shared by all tests, and the reason that `tests/` is on the import path: one real search, killed once on its way."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapt_bundles import write_dark_bundle
from real_search import RealSearch, search_small, search_with_a_kill


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealSearch:
    """The demo model searched for a few trials by processes, the first of which was killed."""
    return search_with_a_kill(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="session")
def bundles(real: RealSearch) -> list[Path]:
    """Every point of its front as a bundle."""
    document = real.json("export", "--study", "real", "--all", "--out", "bundles")
    return [real.folder / row["bundle"] for row in document["bundles"]]


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study of the smallest network."""
    return search_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def dark_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that was calibrated on dark pictures; not to be changed."""
    folder = tmp_path_factory.mktemp("dark")
    return write_dark_bundle(folder / "bundle", folder / "kernels")
