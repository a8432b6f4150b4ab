"""One interface for what a module is worth, whatever it is for."""

import pickle

import numpy as np
import pytest
import torch

from qsearch.data.boxes import ImageBoxes
from qsearch.measure import task as tasks
from qsearch.measure.accuracy import compare_accuracy, output_digest
from qsearch.measure.boxes import Detections, decode_outputs
from qsearch.measure.measurement import Accuracy
from qsearch.measure.task import ClassificationScorer, DetectionScorer, box_divergence
from qsearch.models.detection import DetectionHead
from qsearch.search.tables.projection import box_direction

HEAD, SIDE = DetectionHead((8,)), (32, 32)


@pytest.fixture
def outputs() -> np.ndarray:
    """What an imaginary detector of three classes says of 30 images: a few boxes each, float32 (30, 16, 7)."""
    random = np.random.default_rng(0)
    found = random.normal(0, 0.3, (30, 16, 7)).astype(np.float32)
    found[..., 4:] = random.normal(-6, 3, (30, 16, 3))
    return found


def scorer(outputs: np.ndarray) -> DetectionScorer:
    """Everything that the detector is sure of is there."""
    found = decode_outputs(outputs, HEAD, SIDE)
    truths = [ImageBoxes(one.boxes[one.scores > 0.3], one.classes[one.scores > 0.3], SIDE) for one in found]
    return DetectionScorer(HEAD, tuple(truths), SIDE)


def test_a_classifier_is_scored_as_ever() -> None:
    random = np.random.default_rng(0)
    logits, float_logits, labels = random.normal(size=(50, 7)), random.normal(size=(50, 7)), random.integers(0, 7, 50)
    one = ClassificationScorer(labels)
    assert one.compare(logits, float_logits) == compare_accuracy(logits, float_logits, labels)
    assert one.compare(logits, float_logits).metric == "top-1"
    assert (one.count, one.labels is labels) == (50, True)


def test_a_detector_loses_mean_average_precision(outputs: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    # What torchmetrics would say of float and of the other module; that it is asked with the right boxes is seen below.
    asked: list[list[Detections]] = []

    def answer(detections: list[Detections], truths: tuple[ImageBoxes, ...]) -> tuple[float, float]:
        asked.append(detections)
        return (70.0, 90.0) if len(asked) == 1 else (64.0, 88.0)

    monkeypatch.setattr(tasks, "mean_average_precision", answer)
    one, other = scorer(outputs), outputs + np.float32(0.2) * np.sign(np.sin(np.arange(7, dtype=np.float32)))
    found = one.compare(other, outputs)
    assert (found.metric, found.second_metric) == ("mAP", "mAP@50")
    assert (found.top1, found.top5, found.top1_loss_pp, found.images) == (64.0, 88.0, 6.0, 30)
    assert found.output_sha256 == output_digest(other)
    assert found.divergence == pytest.approx(box_divergence(outputs, other))
    low, high = found.top1_loss_ci_pp
    assert 0 < low < high
    one.compare(other, outputs)
    # Float is scored once, whatever is compared with it.
    assert len(asked) == 3
    assert np.array_equal(asked[0][0].boxes, decode_outputs(outputs, HEAD, SIDE)[0].boxes)
    assert np.array_equal(asked[1][0].boxes, decode_outputs(other, HEAD, SIDE)[0].boxes)


def test_a_scorer_goes_to_another_process(outputs: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "mean_average_precision", lambda detections, truths: (50.0, 80.0))
    one = scorer(outputs)
    assert pickle.loads(pickle.dumps(one)).compare(outputs, outputs) == one.compare(outputs, outputs)


def test_a_run_of_a_detector_cannot_be_bounded_by_a_part_of_it(outputs: np.ndarray) -> None:
    assert scorer(outputs).labels is None
    assert scorer(outputs).count == 30


def test_accuracy_of_older_records_is_top_1() -> None:
    assert Accuracy(90.0, 99.0, 1.0, (0.0, 2.0), 10, "").metric == "top-1"
    assert Accuracy(90.0, 99.0, 1.0, (0.0, 2.0), 10, "").second_metric == "top-5"


def test_divergence_of_boxes_is_what_random_directions_see(outputs: np.ndarray) -> None:
    assert box_divergence(outputs, outputs) == 0.0
    change = np.random.default_rng(1).normal(0, 0.01, outputs.shape).astype(np.float32)
    measured = box_divergence(outputs, outputs + change)
    generator, seen = torch.Generator().manual_seed(0), []
    for _ in range(300):
        signs = torch.randint(0, 2, outputs.shape, generator=generator).float() * 2 - 1
        moved = (box_direction(torch.from_numpy(outputs), signs) * torch.from_numpy(change)).sum((1, 2))
        seen.append(0.5 * float((moved**2).mean()))
    assert np.mean(seen) == pytest.approx(measured, rel=0.05)
