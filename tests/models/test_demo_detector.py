"""The built-in detector and its scenes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qsearch.data.box_listing import list_scenes
from qsearch.data.boxes import ImageBoxes
from qsearch.measure.average_precision import average_precision, match_all
from qsearch.measure.boxes import decode_outputs
from qsearch.models import demo, demo_detector
from qsearch.models.demo_detector import train
from qsearch.models.demo_detector.scenes import SIDE, compose, compose_all
from qsearch.models.detection import DetectionHead
from qsearch.models.import_torch import import_model
from qsearch.models.zoo import load_model


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scenes() -> dict[str, tuple[demo_detector.Scene, ...]]:
    return demo_detector.load_scenes()


def test_scenes_are_the_same_every_time_and_show_what_they_say(scenes: dict[str, tuple[demo_detector.Scene, ...]]) -> None:
    assert {part: len(found) for part, found in scenes.items()} == demo_detector.SCENES
    listing = list_scenes()
    assert listing.boxes is not None
    every = [scene for part in scenes.values() for scene in part]
    for scene, boxes in zip(every, listing.boxes, strict=True):
        assert np.array_equal(scene.boxes, boxes.boxes)
        assert 1 <= len(scene.classes) <= 6
        assert scene.boxes.min() >= 0
        assert scene.boxes.max() <= SIDE
        assert (scene.boxes[:, 2:] > scene.boxes[:, :2]).all()
    assert np.array_equal(np.asarray(listing.open(200)), every[200].image)
    assert np.bincount(np.concatenate([scene.classes for scene in every]), minlength=10).min() > 200


def test_no_garment_is_in_two_parts(scenes: dict[str, tuple[demo_detector.Scene, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = demo.load_images()
    drawn: list[set[bytes]] = []

    def remember(garments: np.ndarray, *rest: object) -> tuple[()]:
        drawn.append({garment.tobytes() for garment in garments})
        return ()

    monkeypatch.setattr(demo_detector, "compose_all", remember)
    demo_detector.load_scenes()
    assert len(drawn) == 3
    assert sum(map(len, drawn)) == len({image.tobytes() for image in images}) == len(set.union(*drawn))


def test_a_box_ends_where_the_garment_does() -> None:
    garment = np.zeros((1, 28, 28), np.uint8)
    garment[0, 7:21, 9:19] = 200
    random = np.random.default_rng(0)
    for _ in range(20):
        scene = compose(garment, np.array([3]), random)
        ((left, top, right, bottom),) = scene.boxes.astype(int)
        # The scaled edge is blurred by a pixel; the background is darker than 120.
        inside = scene.image[top + 2 : bottom - 2, left + 2 : right - 2]
        outside = scene.image.copy()
        outside[top:bottom, left:right] = 0
        assert inside.min() > 120 > outside.max()
        assert scene.classes.tolist() == [3]


def test_mean_average_precision_in_float(scenes: dict[str, tuple[demo_detector.Scene, ...]]) -> None:
    some = scenes["search"][:150]
    with torch.no_grad():
        outputs = demo_detector.build()(train.normalise(some)).numpy()
    head = DetectionHead.from_json(demo_detector.DETECTION)
    truths = [ImageBoxes(scene.boxes, scene.classes, (SIDE, SIDE)) for scene in some]
    matched = match_all(decode_outputs(outputs, head, (SIDE, SIDE)), truths)
    (score,) = average_precision(matched, np.ones((1, len(some))))
    assert score > 0.68


def test_training_and_deployment_see_the_same_numbers(scenes: dict[str, tuple[demo_detector.Scene, ...]]) -> None:
    listing, given = list_scenes(), train.normalise(scenes["calibration"][:1])[0].numpy()
    np.testing.assert_allclose(demo_detector.PREPROCESSING.apply(listing.open(0)), given, atol=1e-5)


def test_it_is_imported_without_foreign_operators_and_read_by_its_record() -> None:
    loaded = load_model("demo_detector")
    model = import_model("demo_detector", loaded.module, (1, *loaded.preprocessing.shape))
    assert not model.graph.foreign
    assert loaded.detection is not None
    output = model.graph.by_name[model.graph.output].shape
    assert loaded.detection.check_output("demo_detector", output, (SIDE, SIDE)) == len(demo_detector.CLASSES)


def test_package_data_is_small() -> None:
    assert sum(path.stat().st_size for path in train.DATA.iterdir()) < 1_000_000


def test_targets_are_what_a_perfect_network_would_say(scenes: dict[str, tuple[demo_detector.Scene, ...]]) -> None:
    some = scenes["search"][:40]
    targets = train.assign(some, 1.0)
    points = train.centres()
    outputs = torch.full((len(some), len(points), 14), -12.0)
    positive = targets.classes >= 0
    corner = points.expand(len(some), -1, 2)
    distances = torch.cat([corner - targets.boxes[..., :2], targets.boxes[..., 2:] - corner], 2) / demo_detector.network.STRIDE
    outputs[..., :4][positive] = distances[positive].log()
    outputs[positive, 4 + targets.classes[positive]] = 12.0
    head = DetectionHead.from_json(demo_detector.DETECTION)
    truths = [ImageBoxes(scene.boxes, scene.classes, (SIDE, SIDE)) for scene in some]
    (score,) = average_precision(match_all(decode_outputs(outputs.numpy(), head, (SIDE, SIDE)), truths), np.ones((1, len(some))))
    # A garment that has no position of its own is missed.
    assert score > 0.95
    assert train.loss_of(outputs, targets, 2.0) < 1e-3


def test_training_is_reproducible_and_learns(tmp_path: Path) -> None:
    images, labels = demo.load_images()
    recipe = train.Recipe(steps=3, batch=4)
    first, second = (
        train.train(images[:50], labels[:50], recipe, tmp_path / f"{name}.safetensors").state_dict() for name in "ab"
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = train.train(images[:50], labels[:50], replace(recipe, seed=1), tmp_path / "c.safetensors").state_dict()
    assert not torch.equal(first["box_head.weight"], other["box_head.weight"])


def test_garments_are_used_up_before_any_comes_again() -> None:
    garments = np.full((12, 28, 28), 200, np.uint8)
    scenes = compose_all(garments, np.arange(12), 3, np.random.default_rng(5))
    names = np.concatenate([scene.classes for scene in scenes])
    assert len(set(names.tolist())) == len(names)
