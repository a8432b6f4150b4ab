"""Mean average precision and how sure a difference in it is."""

import importlib.util

import numpy as np
import pytest

from qsearch.data.boxes import ImageBoxes
from qsearch.errors import UsageError
from qsearch.measure.average_precision import average_precision, match_all, paired_interval, resampled
from qsearch.measure.boxes import Detections
from qsearch.measure.mean_average_precision import mean_average_precision


def things(*boxes: tuple[float, ...], classes: tuple[int, ...] | None = None) -> ImageBoxes:
    names = np.zeros(len(boxes), np.int64) if classes is None else np.array(classes, np.int64)
    return ImageBoxes(np.array(boxes, np.float32).reshape(-1, 4), names, (100, 100))


def seen(*boxes: tuple[float, ...], scores: tuple[float, ...], classes: tuple[int, ...] | None = None) -> Detections:
    truth = things(*boxes, classes=classes)
    return Detections(truth.boxes, truth.classes, np.array(scores, np.float32))


def once(detections: list[Detections], truths: list[ImageBoxes]) -> float:
    return float(average_precision(match_all(detections, truths), np.ones((1, len(truths))))[0])


def random_images(count: int, spread: float, seed: int = 0) -> tuple[list[Detections], list[ImageBoxes]]:
    """Things at random, and detections of some of them, off by so much, among others of nothing."""
    random = np.random.default_rng(seed)
    detections, truths = [], []
    for _ in range(count):
        number = int(random.integers(0, 6))
        corner = random.uniform(0, 60, (number, 2))
        boxes = np.concatenate([corner, corner + random.uniform(10, 40, (number, 2))], 1)
        classes = random.integers(0, 3, number)
        truths.append(ImageBoxes(boxes.astype(np.float32), classes, (100, 100)))
        found = np.concatenate([boxes, boxes, random.uniform(0, 50, (2, 4)) + [0, 0, 50, 50]]) + random.normal(
            0, spread, (2 * number + 2, 4)
        )
        names = np.concatenate([classes, np.where(random.random(number) < 0.8, classes, 0), random.integers(0, 3, 2)])
        # Few distinct scores: equal ones must be put in COCO's order too.
        scores = random.integers(1, 20, len(found)) / 20
        order = np.argsort(-scores, kind="stable")
        found = np.concatenate([found[:, :2], np.maximum(found[:, 2:], found[:, :2] + 1)], 1)
        detections.append(Detections(found[order].astype(np.float32), names[order], scores[order].astype(np.float32)))
    return detections, truths


def test_average_precision_by_hand() -> None:
    box = (0.0, 0.0, 10.0, 10.0)
    other = (50.0, 50.0, 60.0, 60.0)
    assert once([seen(box, scores=(0.9,))], [things(box)]) == 1.0
    # Half of the things found, nothing wrong: precision 1 at the recalls 0, 0.01, ... 0.5.
    assert once([seen(box, scores=(0.9,))], [things(box, other)]) == pytest.approx(51 / 101)
    # A false one before it halves the precision everywhere.
    assert once([seen(other, box, scores=(0.9, 0.8))], [things(box)]) == pytest.approx(0.5)
    # The second of two detections of one thing is a false one, and comes after the only thing there is.
    assert once([seen(box, box, scores=(0.9, 0.8))], [things(box)]) == 1.0
    # Overlap 0.8: found at the thresholds 0.5 to 0.8.
    assert once([seen((0.0, 0.0, 10.0, 8.0), scores=(0.9,))], [things(box)]) == pytest.approx(0.7)
    # The right box under another name finds nothing; a class without things does not count.
    assert once([seen(box, scores=(0.9,), classes=(1,))], [things(box)]) == 0.0
    assert once([seen(box, other, scores=(0.9, 0.8), classes=(0, 1))], [things(box)]) == 1.0
    assert once([seen(scores=())], [things(box)]) == 0.0


def test_counting_an_image_twice_is_having_it_twice() -> None:
    detections, truths = random_images(12, 1.5)
    weights = np.random.default_rng(1).integers(0, 4, 12)
    repeated = np.repeat(np.arange(12), weights)
    again = once([detections[i] for i in repeated], [truths[i] for i in repeated])
    assert average_precision(match_all(detections, truths), weights[None].astype(float))[0] == pytest.approx(again, abs=0.01)


def test_intervals() -> None:
    detections, truths = random_images(60, 1.0)
    worse, _ = random_images(60, 3.0)
    good, bad = resampled(match_all(detections, truths), 60), resampled(match_all(worse, truths), 60)
    assert paired_interval(good, good) == (0.0, 0.0)
    low, high = paired_interval(good, bad)
    lost = 100 * (once(detections, truths) - once(worse, truths))
    assert 0 < low < lost < high < 100
    assert paired_interval(bad, good) == pytest.approx((-high, -low))
    # Four times the images, half the width.
    many, many_truths = random_images(240, 1.0)
    many_worse, _ = random_images(240, 3.0)
    narrow = paired_interval(*(resampled(match_all(one, many_truths), 240) for one in (many, many_worse)))
    assert 0.3 < (narrow[1] - narrow[0]) / (high - low) < 0.8


def test_the_figure_is_that_of_torchmetrics() -> None:
    # Not imported here: torchmetrics imports torchvision without the care that it needs beside some builds of torch.
    for name in ("torchmetrics", "pycocotools"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    for seed, spread in ((0, 0.5), (1, 2.0), (2, 5.0)):
        detections, truths = random_images(40, spread, seed)
        score, at_half = mean_average_precision(detections, truths)
        assert score == pytest.approx(100 * once(detections, truths), abs=1e-4)
        assert score < at_half < 100


def test_missing_packages_are_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pycocotools" else found("json"))
    with pytest.raises(UsageError, match=r"needs pycocotools: .*pip install qsearch\[detection\]"):
        mean_average_precision([], [])
