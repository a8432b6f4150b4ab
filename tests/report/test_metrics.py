"""What a person reads is called what it is: top-1 of a classifier, mAP of a detector."""

import io
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from qsearch.config import QuantConfig
from qsearch.measure.measurement import Accuracy, Latency, Measurement, Memory
from qsearch.report.notes import note_text
from qsearch.report.tables import EvaluateRow, evaluate_table, front_table
from qsearch.search.loop.trial_attributes import trial_attributes

TOP1 = Measurement(Latency(1.0, 0.1, 5, 1), Memory(10, 5, 1), Accuracy(90.0, 99.0, 0.5, (0.0, 1.0), 100, "digest"))
MAP = replace(TOP1, accuracy=replace(TOP1.accuracy, metric="mAP"))


def text(table: Table) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_tables() -> None:
    shown = text(evaluate_table([EvaluateRow("int8", 1.0, 10, 2.0, 70.0, 90.0, 100, "mAP", "mAP@50")], "title"))
    assert "mAP %" in shown
    assert "mAP@50 %" in shown
    assert "top-" not in shown
    assert "top-5 %" in text(evaluate_table([EvaluateRow("int8", 1.0, 10, 2.0, 70.0, 90.0, 100)], "title"))
    assert "mAP loss pp" in text(front_table([], MAP, "title"))
    assert "top-1 loss pp" in text(front_table([], TOP1, "title"))


def test_notes_and_attributes_of_trials() -> None:
    config = QuantConfig(precision={"a": "int8"})
    shown = note_text(config, MAP, MAP)
    assert "| mAP, % | 90.00 | 90.00 |" in shown
    assert "| mAP@50, % |" in shown
    assert "\nmAP loss **+0.50 pp**" in shown
    assert "top-1" not in shown.lower()
    assert "\nTop-1 loss **+0.50 pp**" in note_text(config, TOP1, TOP1)
    assert trial_attributes(config, MAP)["mAP"] == 90.0
    assert "top1" not in trial_attributes(config, MAP)
    assert trial_attributes(config, TOP1)["top1"] == 90.0
