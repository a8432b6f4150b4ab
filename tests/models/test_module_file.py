"""Modules kept as files by their content."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from broken_networks import PREPROCESSING, ControlFlow, Net, nan_weight

from qsearch.data import Preprocessing
from qsearch.errors import UnsupportedModelError
from qsearch.models.import_torch import import_model
from qsearch.models.module_file import keep_module
from qsearch.models.zoo import load_model

SMALL = Preprocessing.from_json(PREPROCESSING)


class Doubled(Net):
    """The same layers and weights, another forward."""

    def forward(self, x):
        return self.head(self.features(x)) * 2


Doubled.__name__ = "Net"


def test_the_same_content_is_the_same_file(tmp_path: Path) -> None:
    file = keep_module(Net().train(), SMALL, tmp_path, ("a", "b"))
    written = file.stat().st_mtime_ns
    assert keep_module(Net(), SMALL, tmp_path, ("a", "b")) == file and file.stat().st_mtime_ns == written
    assert file.name.startswith("Net-") and list(tmp_path.iterdir()) == [file]


def test_other_content_is_another_file(tmp_path: Path) -> None:
    other = Net()
    other.head.bias.data += 1e-6
    wider = Preprocessing.from_json({**PREPROCESSING, "mean": [0.4] * 3})
    kept = [keep_module(Net(), SMALL, tmp_path), keep_module(other, SMALL, tmp_path), keep_module(Doubled(), SMALL, tmp_path)]
    kept += [keep_module(Net(), wider, tmp_path), keep_module(Net(), SMALL, tmp_path, ("a", "b"))]
    assert len(set(kept)) == 5 and all(file.name.startswith("Net-") for file in kept)


def test_what_is_loaded_is_what_was_kept(tmp_path: Path) -> None:
    net = Net()
    loaded = load_model(str(keep_module(net, SMALL, tmp_path, ("a", "b"))))
    assert loaded.classes == ("a", "b") and loaded.preprocessing == SMALL
    image = torch.randn((1, 3, 16, 16), generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded.module.module()(image), net.eval()(image))
    model, plain = import_model("a", loaded.module, (1, *SMALL.shape)), import_model("a", net, (1, *SMALL.shape))
    assert [node.name for node in model.graph.layers] == ["first", "second", "head"]
    assert model.fingerprint == plain.fingerprint


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="NaN"):
        keep_module(nan_weight(), SMALL, tmp_path)
    with pytest.raises(UnsupportedModelError, match="torch.export cannot trace model 'ControlFlow'"):
        keep_module(ControlFlow(), SMALL, tmp_path)
    net = Net()
    net.lock = threading.Lock()
    with pytest.raises(UnsupportedModelError, match="cannot be copied"):
        keep_module(net, SMALL, tmp_path)
    (tmp_path / "taken").write_text("")
    with pytest.raises(UnsupportedModelError, match="cannot be kept"):
        keep_module(Net(), SMALL, tmp_path / "taken")
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]
