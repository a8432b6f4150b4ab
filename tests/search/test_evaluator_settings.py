"""Settings as a study keeps them: found again from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsearch.search.evaluation.evaluator import Settings


def test_paths_are_absolute_and_names_stay_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photos = Settings("m:net", weights=Path("w.pth"), data=Path("photos")).to_json()
    assert photos["data"] == str(tmp_path / "photos") and photos["weights"] == str(tmp_path / "w.pth")
    assert Settings.from_json(photos).data == tmp_path / "photos"
    # The built-in images, for a model that is not the built-in one.
    assert Settings.from_json(Settings("m:net", data=Path("demo")).to_json()).data == Path("demo")
    assert Settings.from_json(Settings().to_json()).data is None
