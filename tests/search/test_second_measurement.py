"""The second measurement of a front: its timings, all points in turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qsearch.config import QuantConfig
from qsearch.measure.devices.device import Prepared
from qsearch.measure.measurement import Latency
from qsearch.search.evaluation.evaluator import Settings
from qsearch.search.evaluation.objective import open_evaluator

# Milliseconds of two points in three rounds; in the second something else was at work.
ROUNDS = [[1.0, 2.0], [4.0, 5.0], [1.2, 1.9]]


class Rounds:
    """A device that tells the latencies above."""

    def __init__(self) -> None:
        self.left = list(ROUNDS)

    def handle(self, prepared: Prepared) -> Prepared:
        return prepared

    def paired(self, reference: Any, handles: list[Any], image: np.ndarray, reference_ms: float) -> list[Latency]:
        return [Latency(one, 0.1, 21, 5) for one, _ in zip(self.left.pop(0), handles, strict=True)]


def test_every_point_is_timed_in_several_rounds_and_the_middle_counts(small: Path) -> None:
    evaluator = open_evaluator(
        Settings("broken_networks:Net", data=small / "data", cache_dir=small / "studies" / "cache"), lambda clause: None
    )
    _ = evaluator.baseline
    evaluator.device = device = Rounds()  # type: ignore[assignment]
    configs = [QuantConfig(default_precision=precision) for precision in ("int8", "fp32")]
    (fast, _), (slow, float_accuracy) = evaluator.measure_again(configs)
    assert (fast.median_ms, slow.median_ms) == (1.2, 2.0) and not device.left
    assert float_accuracy.top1_loss_pp == 0.0 and float_accuracy.images == len(evaluator.dataset.labels("heldout"))
