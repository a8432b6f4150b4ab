"""Seals: who has made a thing is known by a key that nobody else can read."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qsearch.errors import UntrustedError
from qsearch.seal import is_own, key_file, require_own, seal_of

ROOT = Path(__file__).parents[1]
DIGEST = "ab" * 32


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without a key."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "qsearch"


def test_own_things_are_known_by_kind_and_content(state: Path) -> None:
    assert not is_own("bundle", DIGEST, "0" * 64) and not state.exists()
    seal = seal_of("bundle", DIGEST)
    assert seal is not None and is_own("bundle", DIGEST, seal)
    strange = ("pack", DIGEST, seal), ("bundle", "cd" * 32, seal), ("bundle", DIGEST, "é" + seal[1:]), ("bundle", DIGEST, "")
    for kind, digest, given in strange:
        assert not is_own(kind, digest, given)
        with pytest.raises(UntrustedError, match="made by this user"):
            require_own("it", kind, digest, given, trust=False)
        require_own("it", kind, digest, given, trust=True)
    assert stat.S_IMODE((state / "key").stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert [path.name for path in state.iterdir()] == ["key"]


def test_another_users_seal_is_not_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = seal_of("bundle", DIGEST) or ""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    with pytest.raises(UntrustedError, match="has no key"):
        require_own("it", "bundle", DIGEST, theirs, trust=False)
    assert seal_of("bundle", DIGEST) != theirs
    with pytest.raises(UntrustedError, match="its seal is not this user's"):
        require_own("it", "bundle", DIGEST, theirs, trust=False)


@pytest.mark.parametrize("harm", ["others can read it", "it is damaged"])
def test_a_key_of_no_use(state: Path, harm: str) -> None:
    seal = seal_of("bundle", DIGEST) or ""
    if "damaged" in harm:
        (state / "key").write_bytes(b"short")
    else:
        (state / "key").chmod(0o644)
    assert seal_of("bundle", DIGEST) is None
    with pytest.raises(UntrustedError, match=harm):
        require_own("it", "bundle", DIGEST, seal, trust=False)


def test_where_no_key_can_be_kept_nothing_is_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert seal_of("bundle", DIGEST) is None
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert key_file() == Path("/home/somebody/.local/state/qsearch/key")


def test_processes_that_make_the_key_at_once_agree(state: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from qsearch.seal import seal_of; print(seal_of('pack', {DIGEST!r}))"
    )
    started = [subprocess.Popen([sys.executable, "-S", "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(8)]
    seals = {process.communicate()[0].strip() for process in started}
    assert seals == {seal_of("pack", DIGEST)}
    assert os.listdir(state) == ["key"]
