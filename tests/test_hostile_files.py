"""Whatever bytes a file holds, it is read or refused for a reason; `tests/bench/fuzz.py` tries many more."""

from __future__ import annotations

import random
import tempfile
from functools import cache
from pathlib import Path

import pytest
from hostile_files import TARGETS, try_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qsearch.errors import UntrustedError

# Pillow and torch have opinions on what they refuse.
pytestmark = pytest.mark.filterwarnings("ignore")

# What files of every kind trip over.
MORSELS = [b"", b"[" * 2000, b'{"a":' * 2000, b"null", b"-1", b"1e999", b"NaN", b"9" * 5000, b"\xff\xfe", b"\0", b'"', b"\n"]
MORSELS += [b"../", b"*a", b"&a ", b"<<: ", b"? ", b"!!python/object:os.system", b"true", b"{}", b"[]", b"\x7f\xff\xff\xff"]


@cache
def seeds(name: str) -> list[bytes]:
    return TARGETS[name].seeds()


@pytest.mark.parametrize("name", TARGETS)
def test_what_the_fuzzers_begin_with_is_right(name: str, tmp_path: Path) -> None:
    if name in ("manifests", "packs", "pack manifests"):
        with pytest.raises(UntrustedError):
            TARGETS[name].read(seeds(name)[0], tmp_path)
    else:
        TARGETS[name].read(seeds(name)[0], tmp_path)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(chosen=st.randoms(use_true_random=False), changes=st.integers(1, 6))
def test_whatever_a_file_holds(name: str, chosen: random.Random, changes: int) -> None:
    data = bytearray(chosen.choice(seeds(name)))
    for _ in range(changes):
        at = chosen.randrange(len(data) + 1)
        end = min(len(data), at + chosen.choice([0, 1, 1, 4, 20]))
        data[at:end] = chosen.choice([chosen.choice(MORSELS), chosen.randbytes(1), bytes(data[at:end]) * 3])
    with tempfile.TemporaryDirectory() as folder:
        try_file(TARGETS[name], bytes(data), Path(folder))
