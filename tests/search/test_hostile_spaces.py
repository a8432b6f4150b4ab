"""Search spaces that somebody made to do harm."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from qsearch.errors import SpaceError
from qsearch.search.space import load_space
from qsearch.search.yaml_source import MOST_BYTES

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
MERGES = "m0: &m0 {k0: 1, j0: 2}\n" + "".join(f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}\n" for n in range(1, 40))
HARM = {
    "aliases that multiply": (LAUGHS, "more than 50,000 values"),
    "merges that multiply": (MERGES, "more than 50,000 values"),
    "an alias of itself": ("a: &a [*a]\n", "recursive|deep"),
    "depth": ("a: " + "[" * 100 + "]" * 100, "nests them more than"),
    "more depth": ("a: " + "[" * 100_000, "not valid YAML"),
    "size": ("a: " + "x" * MOST_BYTES, "bytes, at most"),
    "a constructor": ("a: !!python/object/apply:os.system ['touch harmed']\n", "could not determine a constructor"),
    "no date": ("a: 2001-99-99\n", "month"),
    "a number of many digits": ("a: " + "9" * 5000, "5,000 characters"),
    "a number that takes long to add up": ("version: " + "1:" * 100_000 + "1", "characters, at most"),
    "a version of many digits": ("version: " + "9" * 999, "reads search spaces of 'version: 1', got 999"),
    "a key that is a list": ("? [a, b]\n: c\n", "a key must be a word"),
    "keys of other kinds": ("1: a\nnull: b\n2001-01-01: c\n", "version"),
    "no text": ("a: \x01\n", "not valid YAML"),
}


@pytest.mark.parametrize("what", HARM)
def test_refused_soon_and_in_few_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.chdir(tmp_path)
    text, words = HARM[what]
    Path("space.yaml").write_text(text)
    start = time.monotonic()
    with pytest.raises(SpaceError, match=words) as caught:
        load_space("space.yaml")
    assert time.monotonic() - start < 10 and len(str(caught.value)) < 1000
    assert [path.name for path in tmp_path.iterdir()] == ["space.yaml"]


def test_aliases_and_merges_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        "version: 1\nprecisions:\n  default: &a [int8, fp32]\n  types: {conv: *a, dense: *a}\nstart: {<<: {precision: int8}}\n"
    )
    space = load_space(path)
    assert space.precisions.types["conv"] == ("fp32", "int8") and space.start.precision == "int8"
