"""Observe a model once: the float pass that every calibration mode later draws on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from qsearch.calibrate.histogram import TensorStatistics, channel_extremes
from qsearch.calibrate.record import StatisticsRecord
from qsearch.errors import CalibrationError, DataError
from qsearch.models.graph import Model, Node
from qsearch.models.interpret import interpret, one_thread
from qsearch.models.interpret_memory import images_run

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
    reads: dict[str, np.ndarray] = {}
    readers = {node.name: [one for one in model.graph.consumers[node.name] if one.is_layer] for node in model.graph.nodes}

    def record(node: Node, value: torch.Tensor) -> None:
        value = value.float()
        low, high = channel_extremes(value)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise CalibrationError(_not_finite(node, low, high, model))
        known = tensors.get(node.name) or TensorStatistics.empty(len(low))
        tensors[node.name] = known.extended(value, low, high)
        for layer in readers[node.name]:
            if layer.inputs[0] == node.name:
                # Of values that hold windows of images along axis 0, too.
                share = len(value) / node.shape[0] * model.graph.input.shape[0] / count
                reads[layer.name] = reads.get(layer.name, 0.0) + share * tap_means(layer, value)

    half = (len(images) + 1) // 2
    # A batch ends at the half, so that what is known by then does not depend on the batch size either.
    batches = _batches(half, len(images), batch_size)
    count = sum(images_run(model.graph, stop - start) for start, stop in batches)
    for start, stop in batches:
        batch = np.ascontiguousarray(images[start:stop], np.float32)
        interpret(model, torch.tensor(batch), record)
        if stop == half:
            early = {name: (one.minimum, one.maximum) for name, one in tensors.items()}
        if progress is not None:
            progress(stop, len(images))
    return StatisticsRecord(model.fingerprint, len(images), tensors, early, reads)


def tap_means(layer: Node, value: torch.Tensor) -> np.ndarray:
    """Mean of what each tap of a layer's kernel reads, over images and places, padding included.

    Args:
        layer: A convolution or linear layer.
        value: float32, its input.

    Returns:
        float64 (I, kh, kw).
    """
    conv = layer.conv
    if value.dim() != 4:
        return value.reshape(-1, value.shape[-1]).mean(0, dtype=torch.float64).numpy()[:, None, None]
    top, left, bottom, right = conv.padding
    mean = F.pad(value.mean(0, dtype=torch.float64), (left, right, top, bottom))
    taps = np.empty((value.shape[1], *conv.kernel))
    spans = [conv.stride[axis] * (layer.shape[2 + axis] - 1) + 1 for axis in (0, 1)]
    for y in range(conv.kernel[0]):
        for x in range(conv.kernel[1]):
            begin = y * conv.dilation[0], x * conv.dilation[1]
            rows, columns = (slice(at, at + span, step) for at, span, step in zip(begin, spans, conv.stride, strict=True))
            taps[:, y, x] = mean[:, rows, columns].mean((1, 2))
    return taps


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
