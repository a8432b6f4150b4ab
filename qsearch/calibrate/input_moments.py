"""First and second moments of what every layer reads, for rounding its weights and correcting its bias.

The error of a layer's output, with weights changed by e and the best bias, is e C e' per output channel and position,
C the covariance of what the output channel reads there. It is estimated from positions drawn in every image: a layer
reads far more positions than it has weights per channel, and gathering some is many times faster than unfolding all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qsearch.errors import CalibrationError, DataError
from qsearch.models.graph import Model, Node
from qsearch.models.interpret import forward, one_thread

__all__ = ["MAX_READS", "InputMoments", "KeptMoments", "input_moments", "reads_of"]

# Draws per entry of a row of the covariance, and the fewest draws per image.
DRAWS_PER_READ, LEAST_DRAWS = 48, 16
# Images at a time; part of what the draws depend on.
BATCH = 5
# The widest covariance: one of 8192 x 8192 float64 takes half a gigabyte.
MAX_READS = 8192
# Of the moments that are kept between two roundings of a model, bytes.
MOST_KEPT = 256 * 2**20

Read = Callable[[Node, int, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class InputMoments:
    """Moments of a layer's input, per group of channels.

    Attributes:
        mean: float64 (groups, K), K = I/groups * kh * kw values that an output channel reads, ordered as its weights.
        covariance: float64 (groups, K, K), around the mean.
        count: Positions that were drawn, of all images together.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int


@one_thread()
@torch.no_grad()
def input_moments(
    model: Model,
    images: np.ndarray,
    layers: Collection[str] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, InputMoments]:
    """Estimate the moments of layers' inputs in one float pass.

    The draws of a layer depend on the seed and its own geometry, not on what other layers are asked for.

    Args:
        model: The model.
        images: float32 (N, C, H, W), preprocessed calibration images.
        layers: Whose inputs; None for every layer.
        seed: Of the positions drawn.
        progress: Called after every batch with the number of images done and their total.

    Returns:
        Layer name -> moments, in graph order.

    Raises:
        DataError: There are no images.
        CalibrationError: A layer reads NaN or infinity, or more values at once than a covariance can be kept of.
    """
    if len(images) == 0:
        raise DataError("the moments of layers' inputs need at least one calibration image, got none")
    wanted = [node for node in model.graph.layers if layers is None or node.name in layers]
    for node in wanted:
        _check_reads(node, model)
    sums = {node.name: _Sums(len(images)) for node in wanted}
    for start in range(0, len(images), BATCH):
        batch = torch.tensor(np.ascontiguousarray(images[start : start + BATCH], np.float32))

        def read(node: Node, position: int, value: Tensor, first: int = start) -> Tensor:
            if position == 0 and node.name in sums:
                sums[node.name].add(node, value, torch.Generator().manual_seed(seed + first))
            return value

        forward(model, batch, read=read)
        if progress is not None:
            progress(min(start + BATCH, len(images)), len(images))
    return {name: found.moments(name) for name, found in sums.items()}


class KeptMoments:
    """Moments of the inputs of the model that was asked about last, kept as long as they take little memory.

    A model is rounded to one grid after another, and a float pass takes about as long as the rounding that it is for.

    Args:
        images: Gives the calibration images, float32 (N, C, H, W), preprocessed; called if a float pass is due.
        most_bytes: Beyond which nothing is kept.
    """

    def __init__(self, images: Callable[[], np.ndarray], most_bytes: int = MOST_KEPT) -> None:
        self._images, self._most_bytes = images, most_bytes
        self._model: Model | None = None
        self._kept: dict[str, InputMoments] = {}

    def of(
        self, model: Model, layers: Collection[str], progress: Callable[[int, int], None] | None = None
    ) -> dict[str, InputMoments]:
        """The moments of layers' inputs, as of `input_moments`; they are not to be written to."""
        if model is not self._model:
            self._model, self._kept = model, {}
        missing = [name for name in layers if name not in self._kept]
        found = self._kept | (input_moments(model, self._images(), missing, progress=progress) if missing else {})
        size = sum(one.mean.nbytes + one.covariance.nbytes for one in found.values())
        self._kept = found if size <= self._most_bytes else {}
        return {name: found[name] for name in layers}


def _check_reads(node: Node, model: Model) -> None:
    reads = int(np.prod(model.parameters.weight[node.name].shape[1:]))
    if reads > MAX_READS:
        raise CalibrationError(
            f"an output of layer {node.name!r} reads {reads} values at once, and the covariance of at most {MAX_READS} can be "
            "kept: round this layer to nearest"
        )


class _Sums:
    """Sums over the positions drawn so far."""

    def __init__(self, images: int) -> None:
        self._images, self._count = images, 0
        self._first: Tensor | None = None
        self._second: Tensor | None = None

    def add(self, node: Node, value: Tensor, generator: torch.Generator) -> None:
        rows = reads_of(node, value, self._images, generator).float()
        first, second = rows.sum(1).double(), (rows.transpose(1, 2) @ rows).double()
        self._first = first if self._first is None else self._first.add_(first)
        self._second = second if self._second is None else self._second.add_(second)
        self._count += rows.shape[1]

    def moments(self, name: str) -> InputMoments:
        assert self._first is not None and self._second is not None
        mean = self._first / self._count
        covariance = self._second.div_(self._count).sub_(mean[:, :, None] * mean[:, None, :])
        if not bool(covariance.isfinite().all()):
            raise CalibrationError(
                f"layer {name!r} reads NaN or infinity from the calibration images; check the images, the preprocessing and the "
                "weights of the layers before it"
            )
        return InputMoments(mean.numpy(), covariance.numpy(), self._count)


def reads_of(node: Node, value: Tensor, images: int, generator: torch.Generator) -> Tensor:
    """Gather what a layer's outputs read at positions drawn at random.

    Args:
        node: A layer.
        value: Its input, float32 (N, C, H, W) or (N, ..., C).
        images: How many images are observed in all; sets how many positions are drawn of each.
        generator: Of the draws.

    Returns:
        float32 (groups, positions, K), K ordered as (I/groups, kh, kw).
    """
    if node.op == "linear":
        return value.reshape(1, -1, value.shape[-1])
    conv = node.conv
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel, conv.stride, conv.dilation
    top, left, bottom, right = conv.padding
    padded = F.pad(value, (left, right, top, bottom)) if any(conv.padding) else value
    n, channels, height, width = padded.shape
    rows, columns = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
    draws = max(LEAST_DRAWS, -(-DRAWS_PER_READ * (channels // conv.groups) * kh * kw // images))
    drawn = torch.randperm(rows * columns, generator=generator)[:draws]
    corner = drawn // columns * sh * width + drawn % columns * sw
    offsets = (torch.arange(kh)[:, None] * dh * width + torch.arange(kw) * dw).reshape(-1)
    # One pixel of all channels after another, as they lie in memory.
    pixels = padded.permute(0, 2, 3, 1).reshape(n, height * width, channels)
    gathered = pixels.index_select(1, (offsets[:, None] + corner).reshape(-1))
    gathered = gathered.reshape(n, kh * kw, len(drawn), conv.groups, channels // conv.groups)
    return gathered.permute(3, 0, 2, 4, 1).reshape(conv.groups, n * len(drawn), -1)
