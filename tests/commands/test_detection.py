"""Detectors from the command line: a user's own on a table of boxes, and the built-in one from end to end."""

import csv
import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from real_search import command, fails, within

from qsearch.config import QuantConfig
from qsearch.data.boxes import ImageBoxes
from qsearch.export import runner
from qsearch.export.from_study import export_point
from qsearch.export.verify import verify_bundle
from qsearch.measure import mean_average_precision, task
from qsearch.measure.average_precision import average_precision, match_all
from qsearch.measure.boxes import Detections
from qsearch.search.evaluation import requirements
from qsearch.search.evaluation.evaluator import Settings
from qsearch.search.evaluation.objective import prepare_evaluator
from qsearch.search.front import FrontPoint

# Squares are told by their brightness, and are as wide as they are bright.
NETWORK = """
import torch
from torch import nn

PREPROCESSING = {"resize": None, "crop": [16, 24], "mean": [0.0], "std": [1.0], "channels": 1}
CLASSES = ["square"]
DETECTION = {"strides": [8], "distances": "linear"}


class Finder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mean = nn.Conv2d(1, 8, 8, 8)
        self.box = nn.Conv2d(8, 4, 1)
        self.score = nn.Conv2d(8, 1, 1)

    def forward(self, x):
        x = torch.relu(self.mean(x))
        return torch.cat([self.box(x), self.score(x)], 1).flatten(2).transpose(1, 2)


@torch.no_grad()
def build():
    net = Finder()
    net.mean.weight.fill_(1 / 64)
    net.mean.bias.zero_()
    net.box.weight.zero_()
    net.box.bias.fill_(0.5)
    net.score.weight.fill_(5.0)
    net.score.bias.fill_(-10.0)
    return net
"""


def own_score(detections: Sequence[Detections], truths: Sequence[ImageBoxes]) -> tuple[float, float]:
    """What torchmetrics would say, by arithmetic of our own, so that it need not be installed."""
    matched, once = match_all(detections, truths), np.ones((1, len(truths)))
    return 100 * float(average_precision(matched, once)[0]), 0.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A detector, and images with a bright cell of the grid that it finds; on two in ten there is nothing."""
    monkeypatch.setattr(task, "mean_average_precision", own_score)
    monkeypatch.setattr(requirements, "require_torchmetrics", lambda: None)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "finder.py").write_text(NETWORK)
    (tmp_path / "plain.py").write_text(NETWORK.replace("DETECTION =", "UNREAD =").replace("CLASSES =", "NAMES ="))
    (tmp_path / "data").mkdir()
    random, rows = np.random.default_rng(0), []
    for index in range(40):
        pixels = random.integers(0, 30, (16, 24), np.uint8)
        name = f"{index:02d}.png"
        if index % 5:
            x, y = 8 * int(random.integers(3)), 8 * int(random.integers(2))
            pixels[y : y + 8, x : x + 8] = random.integers(120, 255)
            rows.append([name, "square", x, y, x + 8, y + 8])
        else:
            rows.append([name, "", "", "", "", ""])
        Image.fromarray(pixels).save(tmp_path / "data" / name)
    with (tmp_path / "data" / "boxes.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["path", "label", "x1", "y1", "x2", "y2"], *rows])
    return tmp_path


def test_a_user_s_detector_is_evaluated_and_exported(folder: Path) -> None:
    result = within(folder, "evaluate", "--model", "finder:build", "--data", "data", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["task"] == "detection"
    assert [row["metric"] for row in document["rows"]] == ["mAP", "mAP"]
    assert all(row["top1"] > 90 for row in document["rows"])
    assert "task: detection, the loss is that of mAP; box, score stay at int16 or fp32" in result.stderr
    evaluator = prepare_evaluator(Settings("finder:build", data=folder / "data", cache_dir=folder / "studies" / "cache"), print)
    config = QuantConfig(precision={"mean": "int8", "box": "int16", "score": "int16"})
    point = FrontPoint(0, config, evaluator.evaluate(config))
    assert point.measurement.accuracy.metric == "mAP"
    export_point(evaluator, point, evaluator.baseline, folder / "bundle")
    assert verify_bundle(folder / "bundle")["mismatching_bits"] == 0
    assert "detection.json" in (folder / "bundle" / "README.md").read_text()
    with (folder / "data" / "boxes.csv").open(newline="") as stream:
        name, label, *edges = list(csv.reader(stream))[2]
    found = json.loads(within(folder, "run", "bundle", f"data/{name}", "--json").stdout)[0]["boxes"]
    assert [box["name"] for box in found] == [label]
    assert found[0]["box"] == pytest.approx(list(map(float, edges)), abs=0.1)
    shown = within(folder, "run", "bundle", f"data/{name}").stdout
    assert "square" in shown
    assert "boxes found: 1; below 30 %" in shown
    with pytest.raises(runner.BundleProblem, match="outputs X.npy Y.npy instead of predict"):
        runner.predict(folder / "bundle", np.zeros((1, 1, 16, 24), np.float32))


def test_what_does_not_fit_the_task_is_refused(folder: Path) -> None:
    fails(folder, 2, ("'find'", "classification or detection"), "evaluate", "--task", "find")
    plain = ("evaluate", "--model", "plain:build", "--data", "data")
    fails(folder, 2, ("plain:build", "DETECTION"), *plain, "--task", "detection")
    fails(folder, 2, ("boxes.csv", "DETECTION = {'strides'"), *plain)
    with_labels = folder / "labelled"
    shutil.copytree(folder / "data", with_labels)
    rows = "\n".join(f"{index:02d}.png,{index % 2}" for index in range(40))
    (with_labels / "labels.csv").write_text(f"path,label\n{rows}\n")
    labelled = ("evaluate", "--model", "plain:build", "--data", "labelled")
    fails(folder, 2, ("returns shape (1, 6, 5)", "DETECTION = {'strides'"), *labelled)
    (folder / "data" / "boxes.csv").unlink()
    fails(folder, 2, ("holds no boxes.csv", "x1, y1, x2, y2"), "evaluate", "--model", "finder:build", "--data", "data")


def test_missing_packages_are_said_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mean_average_precision.importlib.util, "find_spec", lambda name: None)
    fails(tmp_path, 2, ("torchmetrics and pycocotools", "pip install qsearch[detection]"), "search", "--model", "demo_detector")
    assert not (tmp_path / "studies" / "demo_detector.db").exists()


@pytest.mark.slow
def test_the_built_in_detector_from_search_to_bundle(tmp_path: Path) -> None:
    for name in ("torchmetrics", "pycocotools"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    found = command(tmp_path, "search", "--model", "demo_detector", "--budget", "4", "--json")
    assert found.returncode == 0, found.stderr
    document = json.loads(found.stdout)
    assert document["baseline"]["metric"] == "mAP"
    assert document["baseline"]["top1"] > 70
    assert document["baseline"]["top5"] > 83
    assert document["trials"]["complete"] == 4
    assert "no trial is stopped early" in found.stderr
    precise = {name: point["config"]["precision"][name] for point in document["front"] for name in ("box_head", "class_head")}
    assert set(precise.values()) <= {"fp32", "int16"}
    assert all(point["heldout"]["images"] == 500 for point in document["front"])
    assert "mAP loss pp" in command(tmp_path, "front", "--study", "demo_detector").stdout
    exported = command(tmp_path, "export", "--study", "demo_detector", "--out", "bundle")
    assert exported.returncode == 0, exported.stderr
    verified = json.loads(command(tmp_path, "verify", "bundle", "--json").stdout)
    assert verified["mismatching_bits"] == 0
    boxes = json.loads(command(tmp_path, "run", "bundle", str(_scene(tmp_path)), "--json").stdout)[0]["boxes"]
    assert boxes
    assert all(box["score"] >= 0.05 for box in boxes)


def _scene(folder: Path) -> Path:
    from qsearch.models.demo_detector import load_scenes

    path = folder / "scene.png"
    Image.fromarray(load_scenes()["heldout"][0].image).save(path)
    return path
