"""Train a fake-quantized network: Adam, rates that fall to zero along a cosine, a checkpoint after every epoch.

The loss is the mean of two cross entropies, to the labels and to the float network's probabilities (Hinton et al. 2015,
arXiv:1503.02531, at temperature 1; for quantized students Mishra and Marr 2018, arXiv:1711.05852): the second keeps a
network near float where images are fewer than float had.

An epoch's random choices follow from the seed and its number, so that a training that was killed goes on as if it had not
been, bit for bit at an equal number of torch's threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qsearch.errors import QuantizeError
from qsearch.models.interpret import interpret, one_thread
from qsearch.qat.checkpoint import Checkpoint, CheckpointFolder, Epoch
from qsearch.qat.network import FakeQuantizedNetwork
from qsearch.qat.training_images import TrainingImages

__all__ = ["TrainSettings", "threads_for", "top1", "train"]

# Below so many values of a batch's widest tensor, torch's threads wait for each other longer than they compute.
LEAST_VALUES = 2**19
# The least time between two words on an epoch under way, seconds.
PATIENCE_S = 60.0
VALIDATION_BATCH = 250
# Images, float32 (N, C, H, W) -> the float network's logits, float32 (N, classes); called by two threads at a time.
Teacher = Callable[[Tensor], Tensor]
# Network, inputs, labels -> the mean loss and its gradients.
Gradients = Callable[[FakeQuantizedNetwork, Tensor, Tensor], tuple[Tensor, tuple[Tensor, ...]]]


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        epochs: Passes over the training images.
        batch: Images per step.
        rate: Adam's learning rate at the start, in the units of `FakeQuantizedNetwork`: about the share of a channel's size that
            its weights move by in one step.
        seed: Of the order of images and their augmentation.
    """

    epochs: int = 3
    batch: int = 64
    rate: float = 2e-3
    seed: int = 0


def train(
    network: FakeQuantizedNetwork,
    images: TrainingImages,
    settings: TrainSettings,
    folder: CheckpointFolder,
    progress: Callable[[str], None],
    teacher: Teacher | None = None,
) -> tuple[Epoch, ...]:
    """Train a network, from its last checkpoint on.

    Args:
        network: The network; holds what was trained afterwards.
        images: What to train on.
        settings: How to.
        folder: Where checkpoints are kept.
        progress: Called with what is to be known, line by line.
        teacher: Computes what the float network does, faster than torch.

    Returns:
        What was seen before the first epoch, and in every one since.

    Raises:
        QuantizeError: The loss is not finite.
        DataError: An image cannot be used.
        StudyError: A checkpoint cannot be read or written, or is of another training.
    """
    gradients = partial(_gradients, teacher or partial(interpret, network.plan.model))
    if torch.get_num_threads() != 2:
        with threads_for(network, settings.batch):
            return _train(network, images, settings, folder, (progress, gradients))
    halves = _Halves(gradients)
    with one_thread(), halves.pool:
        return _train(network, images, settings, folder, (progress, halves))


def _train(
    network: FakeQuantizedNetwork,
    images: TrainingImages,
    settings: TrainSettings,
    folder: CheckpointFolder,
    means: tuple[Callable[[str], None], Gradients],
) -> tuple[Epoch, ...]:
    progress = means[0]
    optimizer = torch.optim.Adam(network.trained.values(), lr=settings.rate)
    kept = folder.load()
    if kept is None:
        start = time.process_time()
        epochs = [Epoch(None, top1(network, images.validation_batches(VALIDATION_BATCH)), time.process_time() - start)]
        progress(f"before training: validation top-1 {epochs[0].validation_top1:.2f} % of {len(images.validation)} images")
    else:
        network.load(kept.tensors)
        _load_optimizer(optimizer, network, kept)
        epochs = list(kept.epochs)
        progress(f"going on after epoch {kept.done} of {settings.epochs}")
    for number in range(len(epochs), settings.epochs + 1):
        start = time.process_time()
        loss = _epoch(network, images, settings, optimizer, number, means)
        validated = top1(network, images.validation_batches(VALIDATION_BATCH))
        epochs.append(Epoch(loss, validated, time.process_time() - start))
        folder.save(Checkpoint(network.state() | _optimizer_state(optimizer, network), tuple(epochs)))
        progress(
            f"epoch {number} of {settings.epochs}: loss {loss:.4f}, validation top-1 {validated:.2f} %, "
            f"{epochs[-1].processor_seconds:.0f} s of a processor"
        )
    return tuple(epochs)


def threads_for(network: FakeQuantizedNetwork, batch: int) -> AbstractContextManager[None]:
    """Let torch run on one thread where a batch is too small for several, see `one_thread`."""
    widest = max(int(np.prod(node.shape[1:])) for node in network.plan.model.graph.nodes)
    return one_thread() if batch * widest < LEAST_VALUES else nullcontext()


@torch.no_grad()
def top1(network: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Percent of images whose best class is right."""
    right = count = 0
    for inputs, labels in batches:
        right += int((network(inputs).argmax(1) == labels).sum())
        count += len(labels)
    return 100.0 * right / count


def _epoch(
    network: FakeQuantizedNetwork,
    images: TrainingImages,
    settings: TrainSettings,
    optimizer: torch.optim.Optimizer,
    number: int,
    means: tuple[Callable[[str], None], Gradients],
) -> float:
    """One pass over the images; returns the mean loss."""
    progress, gradients = means
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
    size = min(settings.batch, len(images.training))
    steps = len(images.training) // size
    before, said, total = (number - 1) * steps, time.monotonic(), 0.0
    for step, (inputs, labels) in enumerate(images.batches(size, generator)):
        share = 0.5 * (1 + math.cos(math.pi * (before + step) / (settings.epochs * steps)))
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * share
        loss, found = gradients(network, inputs, labels)
        value = loss.item()
        _require_finite(value, number, settings)
        for parameter, gradient in zip(network.trained.values(), found, strict=True):
            parameter.grad = gradient
        optimizer.step()
        network.settle()
        total += value
        if time.monotonic() - said > PATIENCE_S:
            said = time.monotonic()
            progress(f"epoch {number} of {settings.epochs}, {100 * (step + 1) / steps:.0f} %: loss {total / (step + 1):.4f}")
    # The last step of all has no loss after it.
    _require_finite(sum(float(one.detach().abs().sum()) for one in network.trained.values()), number, settings)
    return total / steps


def _require_finite(value: float, number: int, settings: TrainSettings) -> None:
    if not math.isfinite(value):
        raise QuantizeError(
            f"training went astray in epoch {number}: numbers became {value}. Give a smaller --rate than {settings.rate:g}; the "
            "epochs before are kept"
        )


def _gradients(
    teacher: Teacher, network: FakeQuantizedNetwork, inputs: Tensor, labels: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The mean loss of some images, and its gradients with respect to all that is trained."""
    expected = teacher(inputs).softmax(1)
    logits = network(inputs)
    loss = 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits, expected))
    return loss.detach(), torch.autograd.grad(loss, list(network.trained.values()))


class _Halves:
    """Both halves of a batch at a time, each in a thread of its own.

    Two threads of torch within one operation of a small network gain a tenth; an operation on each of two processors, a half.

    Args:
        gradients: Of one half.
    """

    def __init__(self, gradients: Gradients) -> None:
        self._gradients = gradients
        self.pool = ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,))

    def __call__(self, network: FakeQuantizedNetwork, inputs: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As of one thread; sums of the halves, the first one's first, whichever is ready sooner."""
        if len(inputs) < 2:
            return self._gradients(network, inputs, labels)
        halves = zip(inputs.chunk(2), labels.chunk(2), strict=True)
        shares = [len(half) / len(inputs) for half in inputs.chunk(2)]
        begun = [self.pool.submit(self._gradients, network, *half) for half in halves]
        (loss, of_first), (other, of_second) = (half.result() for half in begun)
        first, second = shares
        sums = tuple(first * one + second * two for one, two in zip(of_first, of_second, strict=True))
        return first * loss + second * other, sums


def _optimizer_state(optimizer: torch.optim.Optimizer, network: FakeQuantizedNetwork) -> dict[str, Tensor]:
    return {
        f"adam:{key}:{name}": value
        for name, parameter in network.trained.items()
        for key, value in optimizer.state[parameter].items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, network: FakeQuantizedNetwork, kept: Checkpoint) -> None:
    for name, parameter in network.trained.items():
        found = {key: kept.tensors.get(f"adam:{key}:{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
        # What no image's gradient has reached has no state.
        optimizer.state[parameter].update({key: value.clone() for key, value in found.items() if value is not None})
