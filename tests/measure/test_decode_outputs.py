"""From a detector's output to boxes."""

import numpy as np
import pytest

from qsearch.errors import UnsupportedModelError
from qsearch.measure.boxes import decode_outputs, overlaps, suppress
from qsearch.models.detection import DetectionHead

# Grids of 2x4 positions at stride 8 and of 1x2 at stride 16.
SIDE = (16, 32)
HEAD = DetectionHead(strides=(8, 16), most_overlap=0.5)
POSITIONS = 2 * 4 + 1 * 2


def silent(channels: int = 6) -> np.ndarray:
    outputs = np.zeros((1, POSITIONS, channels), np.float32)
    outputs[..., 4:] = -20.0
    return outputs


def test_positions_are_rows_of_the_first_grid_and_then_those_of_the_next() -> None:
    outputs = silent()
    # Second row, third column of the first grid: centre (20, 12). Second position of the second grid: centre (24, 8).
    outputs[0, 4 + 2, :4] = np.log([0.5, 0.25, 1.0, 0.5])
    outputs[0, 4 + 2, 4] = 3.0
    outputs[0, 8 + 1, :4] = np.log([1.0, 0.5, 0.25, 0.25])
    outputs[0, 8 + 1, 5] = 1.0
    (seen,) = decode_outputs(outputs, HEAD, SIDE)
    np.testing.assert_allclose(seen.boxes, [[16, 10, 28, 16], [8, 0, 28, 12]], atol=1e-5)
    assert seen.classes.tolist() == [0, 1]
    np.testing.assert_allclose(seen.scores, 1 / (1 + np.exp([-3.0, -1.0])), rtol=1e-6)


def test_linear_distances_and_objectness() -> None:
    outputs = silent(7)
    outputs[0, 0] = [0.25, -3.0, 0.5, 0.5, 2.0, 4.0, -20.0]
    head = DetectionHead(strides=(8, 16), distances="linear", objectness=True)
    (seen,) = decode_outputs(outputs, head, SIDE)
    np.testing.assert_allclose(seen.boxes, [[2, 4, 8, 8]], atol=1e-5)
    np.testing.assert_allclose(seen.scores, [1 / (1 + np.exp(-2.0)) / (1 + np.exp(-4.0))], rtol=1e-6)


def test_boxes_end_at_the_edges_of_the_input_and_weak_ones_are_dropped() -> None:
    outputs = silent()
    outputs[0, 0, :4] = 5000.0
    outputs[0, 0, 4:] = [2.0, -3.5]
    (seen,) = decode_outputs(outputs, HEAD, SIDE)
    assert seen.boxes.tolist() == [[0, 0, 32, 16]]
    assert seen.classes.tolist() == [0]


def test_overlaps_by_hand() -> None:
    a = np.array([[0, 0, 4, 4], [0, 0, 0, 0]], np.float32)
    b = np.array([[2, 0, 6, 4], [4, 4, 8, 8], [0, 0, 0, 0]], np.float32)
    np.testing.assert_allclose(overlaps(a, b), [[8 / 24, 0, 0], [0, 0, 0]])


def test_suppression_spares_other_classes_and_what_only_a_suppressed_box_overlaps() -> None:
    # Each overlaps the next by 6 of 14, and none the one after that.
    boxes = np.array([[x, 0, x + 10, 1] for x in (0, 4, 8)], np.float32)
    assert suppress(boxes, np.zeros(3, np.int64), 0.4).tolist() == [0, 2]
    assert suppress(boxes, np.array([0, 1, 0]), 0.4).tolist() == [0, 1, 2]
    assert suppress(boxes, np.zeros(3, np.int64), 0.5).tolist() == [0, 1, 2]
    assert suppress(boxes[:0], np.zeros(0, np.int64), 0.5).tolist() == []


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "expected strides"),
        ({"strides": [8], "anchors": 3}, "anchors"),
        ({"strides": []}, "strides must be a list of positive integers"),
        ({"strides": [8.0]}, "strides must be"),
        ({"strides": [8], "distances": "log"}, "'exp' or 'linear', got 'log'"),
        ({"strides": [8], "least_score": 2}, "least_score must be a number from 0 to 1, got 2"),
        ({"strides": [8], "most_boxes": 300}, "most_boxes must be an integer from 1 to 100, got 300"),
        ({"strides": [8], "heads": "head"}, "heads must be a list"),
        ("strides", "expected strides"),
    ],
)
def test_impossible_records_are_refused(record: object, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        DetectionHead.from_json(record)


def test_a_record_survives_json_and_knows_its_output() -> None:
    head = DetectionHead((8, 16), "linear", True, ("head.*",), 0.1, 0.5, 10)
    assert DetectionHead.from_json(head.to_json()) == head
    assert HEAD.check_output("net", (1, POSITIONS, 7), SIDE) == 3
    for shape in ((1, POSITIONS, 4), (1, POSITIONS + 1, 7), (1, 7)):
        with pytest.raises(UnsupportedModelError, match=r"a detector returns \(batch, 10, 4 \+ classes\)"):
            HEAD.check_output("net", shape, SIDE)
    with pytest.raises(UnsupportedModelError, match="stride 16 .* does not divide the input of 24x16"):
        HEAD.check_output("net", (1, POSITIONS, 7), (16, 24))
