"""Observe a model once: the float pass that every calibration mode later draws on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from qsearch.calibrate.histogram import TensorStatistics, channel_extremes
from qsearch.calibrate.record import StatisticsRecord
from qsearch.errors import CalibrationError, DataError
from qsearch.models.graph import Model, Node
from qsearch.models.interpret import interpret, one_thread

__all__ = ["observe"]


@one_thread()
def observe(
    model: Model, images: np.ndarray, batch_size: int, progress: Callable[[int, int], None] | None = None
) -> StatisticsRecord:
    """Record the statistics of every value in one float pass.

    Args:
        model: The model.
        images: float32 (N, C, H, W), preprocessed calibration images.
        batch_size: Images at a time; the record does not depend on it, up to float rounding in the model.
        progress: Called after every batch with the number of images done and their total.

    Returns:
        The record.

    Raises:
        DataError: There are no images, or they do not have the model's input shape.
        CalibrationError: A value is NaN or infinite.
    """
    expected = model.graph.input.shape[1:]
    if images.ndim != len(expected) + 1 or images.shape[1:] != expected or len(images) == 0:
        raise DataError(
            f"calibration needs images of shape (N, {', '.join(map(str, expected))}) with N at least 1, got {images.shape}; "
            "check the data directory and the preprocessing"
        )
    tensors: dict[str, TensorStatistics] = {}
    early: dict[str, tuple[float, float]] = {}

    def record(node: Node, value: torch.Tensor) -> None:
        value = value.float()
        low, high = channel_extremes(value)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise CalibrationError(_not_finite(node, low, high, model))
        known = tensors.get(node.name) or TensorStatistics.empty(len(low))
        tensors[node.name] = known.extended(value, low, high)

    half = (len(images) + 1) // 2
    # A batch ends at the half, so that what is known by then does not depend on the batch size either.
    for start, stop in _batches(half, len(images), batch_size):
        batch = np.ascontiguousarray(images[start:stop], np.float32)
        interpret(model, torch.tensor(batch), record)
        if stop == half:
            early = {name: (one.minimum, one.maximum) for name, one in tensors.items()}
        if progress is not None:
            progress(stop, len(images))
    return StatisticsRecord(model.fingerprint, len(images), tensors, early)


def _batches(half: int, count: int, batch_size: int) -> list[tuple[int, int]]:
    """(start, stop) of every batch."""
    parts = ((0, half), (half, count))
    return [(start, min(start + batch_size, end)) for begin, end in parts for start in range(begin, end, batch_size)]


def _not_finite(node: Node, low: np.ndarray, high: np.ndarray, model: Model) -> str:
    what = "NaN" if np.isnan(low).any() or np.isnan(high).any() else "infinity"
    if node.op == "input":
        return f"the preprocessed images hold {what}; check the preprocessing's mean and std, and the image files"
    weight = model.parameters.weight.get(node.name)
    if weight is not None and not np.isfinite(weight).all():
        return f"layer {node.name!r} has NaN or infinity in its weights; the checkpoint is damaged, train or download it again"
    return (
        f"the float model yields {what} at node {node.name!r} ({node.op}, shape {node.shape}); run the model on these images in "
        "PyTorch, then repair its weights or the preprocessing: no quantization can be calibrated on it"
    )
