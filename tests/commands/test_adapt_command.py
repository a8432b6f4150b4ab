"""`adapt` on the command line: a table or one document, exit codes, and messages that say what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from adapt_bundles import DARK, contents, pictures, record, run_here
from real_search import fails, within

from qsearch.adapt.replay import Modules


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Modules, "_run", run_here)


@pytest.fixture
def folder(dark_bundle: Path, tmp_path: Path) -> Path:
    """A bundle and statistics of bright pictures, of dark ones and of few."""
    bundle = Path(shutil.copytree(dark_bundle, tmp_path / "bundle"))
    record(bundle, tmp_path / "bright.npz", pictures(64, seed=2))
    record(bundle, tmp_path / "dark.npz", pictures(64, DARK, seed=3))
    record(bundle, tmp_path / "few.npz", pictures(3, seed=2))
    return tmp_path


def test_drift_proposal_application_and_the_way_back(folder: Path) -> None:
    before = contents(folder / "bundle")
    result = within(folder, "adapt", "bundle", "--stats", "bright.npz")
    assert result.returncode == 0, result.stderr
    assert "input" in result.stdout and "*" in result.stdout
    assert "values have moved; new scales" in result.stderr and "--apply" in result.stderr
    assert contents(folder / "bundle") == before
    result = within(folder, "adapt", "bundle", "--stats", "bright.npz", "--apply", "--json")
    document = json.loads(result.stdout)
    assert document["verdict"]["accepted"] and document["applied"]["version"] == 2 and document["version"] == 1
    assert "is version 2 now" in result.stderr
    document = json.loads(within(folder, "adapt", "bundle", "--rollback", "--json").stdout)
    assert (document["version"], document["was"]) == (1, 2)
    assert contents(folder / "bundle") == before


def test_nothing_to_do_and_refusals(folder: Path) -> None:
    before = contents(folder / "bundle")
    result = within(folder, "adapt", "bundle", "--stats", "dark.npz", "--apply", "--json")
    assert result.returncode == 0 and "nothing is proposed" in result.stderr
    document = json.loads(result.stdout)
    assert document["verdict"] is None and not document["drifted"] and "applied" not in document
    result = within(folder, "adapt", "bundle", "--stats", "few.npz", "--apply")
    assert result.returncode == 1 and "refused: there are 3 images" in result.stderr
    assert contents(folder / "bundle") == before
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["bundle"]


def test_contradictions_and_bad_input(folder: Path) -> None:
    (folder / "short.npz").write_bytes((folder / "bright.npz").read_bytes()[:1000])
    fails(folder, 2, ("either --stats FILE, or --rollback",), "adapt", "bundle")
    fails(folder, 2, ("either --stats FILE, or --rollback",), "adapt", "bundle", "--stats", "bright.npz", "--rollback")
    fails(folder, 2, ("--apply and --data",), "adapt", "bundle", "--rollback", "--apply")
    fails(folder, 2, ("short.npz", "cut short"), "adapt", "bundle", "--stats", "short.npz")
    fails(folder, 2, ("none", "does not exist"), "adapt", "bundle", "--stats", "bright.npz", "--data", "none")
    fails(folder, 1, ("none is not a bundle",), "adapt", "none", "--stats", "bright.npz")
    fails(folder, 1, ("no version to go back to",), "adapt", "bundle", "--rollback")
