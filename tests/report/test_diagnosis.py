"""A diagnosis in words and as a picture."""

from __future__ import annotations

import json

import numpy as np
import pytest
from diagnoses import diagnosis, layer, remedy
from PIL import Image
from rich.table import Table

from qsearch.report.diagnosis_document import diagnosis_document
from qsearch.report.diagnosis_pictures import ACTIVATIONS, WEIGHTS, draw_diagnosis
from qsearch.report.diagnosis_tables import advice, diagnosis_text
from qsearch.report.pictures import COLOURS, HEADER, LEFT
from qsearch.report.table_pictures import HEADING, HEIGHT
from qsearch.search.diagnosis.remedies import Remedies

LAYERS = [layer(0, "fp32"), layer(1), layer(2, "w4a8"), layer(3)]
FOUND = [remedy("calibration", 4.0), remedy("equalization", 2.0, not_best=True), remedy("granularity", -1.0)]


def pixels(image: Image.Image, panel: int, colour: str) -> np.ndarray:
    """Of every column, how many pixels of a panel have a colour."""
    top = HEADER + panel * (HEADING + HEIGHT) + HEADING
    part = np.asarray(image)[top : top + HEIGHT + 1, LEFT:]
    return (part == np.array(tuple(bytes.fromhex(colour[1:])))).all(2).sum(0)


def bars(columns: np.ndarray) -> int:
    return int((np.diff((columns > 0).astype(int), prepend=0) == 1).sum())


def test_the_picture_has_a_bar_of_every_integer_layer_and_of_every_remedy() -> None:
    image = draw_diagnosis(diagnosis(LAYERS, Remedies(list(FOUND))), "a configuration")
    assert bars(pixels(image, 0, COLOURS["int8"])) == 2 and bars(pixels(image, 0, COLOURS["w4a8"])) == 1
    costs = pixels(image, 0, COLOURS["int8"])
    heights = [int(column) for column in costs[np.flatnonzero(np.diff((costs > 0).astype(int), prepend=0) == 1)]]
    assert heights[0] < heights[1]
    # Weights have a growing share of the error.
    shares = [pixels(image, 2, colour) for colour in (WEIGHTS, ACTIVATIONS)]
    assert all(bars(columns) == 3 for columns in shares)
    assert 0.15 < shares[0].sum() / (shares[0].sum() + shares[1].sum()) < 0.25
    assert bars(pixels(image, 3, COLOURS["int8"])) == 1
    without = draw_diagnosis(diagnosis(LAYERS, Remedies()), "a configuration")
    assert image.height > without.height + 3 * 40


@pytest.mark.parametrize("count", [1, 60])
def test_pictures_are_as_wide_as_the_network_is_deep(count: int) -> None:
    image = draw_diagnosis(diagnosis([layer(i % 9) for i in range(count)], Remedies(list(FOUND))), "a configuration")
    assert image.width < LEFT + 30 * max(count, 30)


def test_the_text_names_everything() -> None:
    remedies = Remedies(list(FOUND), ["migration 0.5"], ["weight scale mse"], {"fp32 in x": "no kernel"})
    parts = diagnosis_text(diagnosis(LAYERS, remedies), "a configuration", 60.0)
    words = "\n".join(part for part in parts if isinstance(part, str))
    tables = [part for part in parts if isinstance(part, Table)]
    assert len(tables) == 2 and tables[0].row_count == 4 and tables[1].row_count == 3
    for expected in (
        "a configuration: top-1 85.00 %, loss +5.00 pp (95 % interval +4.00 to +6.00) on 500 search images",
        "chosen: 1·fp32 2·int8 1·w4a8, calibration max, layer_wise, weight scale max",
        "12.34% of the values of 'blocks.1.conv' lie beyond [-1, 3]; they were seen from -2 to 9",
        "all weights are zero: 'blocks.0.conv' 2 of 16",
        "never changed on the calibration images: 'blocks.1.conv' 1 of 8",
        "10 of the 20 classes",
        "the second half of the 128 images widened most the ranges of 'blocks.1.conv' +50%",
        "changes nothing here: migration 0.5",
        "would not fit into 60 seconds (--seconds): weight scale mse",
        "cannot be built: fp32 in x: no kernel",
        'try first: calibration changed, which gains +4.00 pp (+3.00 to +5.00) at 1.00 times the latency: set {"calibration":',
    ):
        assert expected in words
    assert words.splitlines()[-1].startswith("try first: ")


def test_the_document_is_json() -> None:
    document = json.loads(json.dumps(diagnosis_document(diagnosis(LAYERS, Remedies(list(FOUND)))), allow_nan=False))
    assert [one["layer"] for one in document["layers"]] == [f"blocks.{i}.conv" for i in (3, 2, 1, 0)]
    assert document["layers"][0]["weight_share"] + document["layers"][0]["activation_share"] == 1
    assert document["layers"][-1]["snr_db"] is None
    assert document["first"] == {"name": "calibration changed", "kind": "calibration", "change": {"calibration": "changed"}}
    assert document["remedies"][0]["helps"] and not document["remedies"][2]["helps"]


@pytest.mark.parametrize(
    "found, loss, words",
    [
        ([remedy("calibration", 0.5, divergence=0.1)], 5.0, ("no single remedy gains more", "0.2000 -> 0.1000 nats", '{"calibr')),
        ([remedy("calibration", 0.5, divergence=0.3)], 5.0, ("no single remedy gains more", "nor brings any", "more images")),
        ([], 0.2, ("not more than chance explains on 500 images", "nor brings any")),
    ],
)
def test_advice_where_nothing_helps_for_certain(found: list, loss: float, words: tuple[str, ...]) -> None:
    given = advice(diagnosis(LAYERS, Remedies(found), loss))
    assert all(word in given for word in words), given
