"""Detectors that a user brings: where the record of how their output is read is found."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from qsearch.errors import UnsupportedModelError
from qsearch.models.detection import DetectionHead
from qsearch.models.import_torch import import_model
from qsearch.models.zoo import load_model


class TwoStrides(nn.Module):
    """A head on each of two grids, their positions one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(1, 8, 3, 8, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.fine_head, self.coarse_head = nn.Conv2d(8, 7, 1), nn.Conv2d(8, 7, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = torch.relu(self.fine(x))
        coarse = torch.relu(self.coarse(fine))
        heads = (self.fine_head(fine), self.coarse_head(coarse))
        return torch.cat([head.flatten(2).transpose(1, 2) for head in heads], 1)


def archive(path: Path, record: object) -> str:
    program = torch.export.export(TwoStrides().eval(), (torch.zeros(1, 1, 32, 48),))
    torch.export.save(program, path, extra_files={"detection.json": json.dumps(record)})
    return str(path)


def test_an_archive_brings_its_record(tmp_path: Path) -> None:
    loaded = load_model(archive(tmp_path / "net.pt2", {"strides": [8, 16], "heads": ["*_head"]}))
    assert loaded.detection == DetectionHead((8, 16), heads=("*_head",))
    model = import_model(loaded.name, loaded.module, (1, 1, 32, 48))
    output = model.graph.by_name[model.graph.output].shape
    assert loaded.detection.check_output("net", output, (32, 48)) == 3


def test_a_record_that_cannot_be_is_refused_with_its_file(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"net.pt2: detection record: strides must be"):
        load_model(archive(tmp_path / "net.pt2", {"strides": "8"}))


def test_a_factory_brings_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    lines = ["from torch import nn", "DETECTION = {'strides': [4]}", "def build():", "    return nn.Conv2d(3, 7, 4, 4)"]
    (tmp_path / "user_detector.py").write_text("\n".join(lines))
    assert load_model("user_detector:build").detection == DetectionHead((4,))
    (tmp_path / "wrong_detector.py").write_text("\n".join(lines).replace("strides", "stride"))
    with pytest.raises(UnsupportedModelError, match=r"wrong_detector:build: detection record: expected strides"):
        load_model("wrong_detector:build")
