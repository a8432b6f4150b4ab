"""Train the built-in model: `python -m qsearch.models.demo.train`.

The weights in `data/` come from this script with its default arguments. One thread count gives one result: seeds are fixed, and
PyTorch's CPU kernels are deterministic at a fixed number of threads.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as serialize
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from qsearch.models.demo.images import read_images_and_labels
from qsearch.models.demo.network import DemoNet
from qsearch.whole_files import write_whole

__all__ = ["Recipe", "augment", "divide", "main", "train"]

DATA = Path(__file__).parent / "data"
MEAN, STD = 0.2860, 0.3530


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters; choices between them are made on the validation images, never on the test images.

    Attributes:
        epochs: passes over the 55,000 training images.
        small_epochs_share: share of the epochs, the first ones, run on images shrunk to `small_side`; they cost half as much.
        small_side: side of the shrunk images, in pixels.
        batch: images per step.
        peak_learning_rate: highest value of the one-cycle schedule.
        weight_decay: L2 penalty, on weights only (not on batch norm and biases).
        label_smoothing: probability mass spread over all classes.
        average_decay: per-step decay of the averaged weights, which are the result.
        validation_images: training images held out.
        seed: of the split, the initial weights, the order and the augmentation.
    """

    epochs: int = 12
    small_epochs_share: float = 0.4
    small_side: int = 20
    batch: int = 128
    peak_learning_rate: float = 0.2
    weight_decay: float = 5e-4
    label_smoothing: float = 0.05
    average_decay: float = 0.995
    validation_images: int = 5000
    seed: int = 0


def normalise(images: np.ndarray) -> torch.Tensor:
    """Scale images as the network wants them.

    Args:
        images: uint8 (N, 28, 28).

    Returns:
        float32 (N, 1, 28, 28), about zero mean and unit variance.
    """
    return ((torch.from_numpy(images.copy()).float() / 255 - MEAN) / STD).unsqueeze(1)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift each image by up to two pixels either way and mirror half of them.

    Args:
        images: float32 (N, 1, H, W).
        generator: source of randomness.

    Returns:
        float32 (N, 1, H, W).
    """
    count, _, height, width = images.shape
    black = -MEAN / STD
    padded = F.pad(images[:, 0], (2, 2, 2, 2), value=black)
    top, left = torch.randint(0, 5, (2, count, 1, 1), generator=generator)
    rows = top + torch.arange(height).view(1, -1, 1)
    columns = left + torch.arange(width).view(1, 1, -1)
    mirrored = torch.rand(count, 1, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, width + 3 - columns, columns)
    return padded[torch.arange(count).view(-1, 1, 1), rows, columns].unsqueeze(1)


def batches(
    images: torch.Tensor, labels: torch.Tensor, size: int, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield shuffled, augmented batches; the incomplete last one is dropped.

    Args:
        images: float32 (N, 1, H, W).
        labels: int64 (N,).
        size: images per batch.
        generator: source of randomness.

    Yields:
        Images, float32 (size, 1, H, W), and labels, int64 (size,).
    """
    order = torch.randperm(len(images), generator=generator)
    for start in range(0, len(order) - size + 1, size):
        chosen = order[start : start + size]
        yield augment(images[chosen], generator), labels[chosen]


@torch.no_grad()
def accuracy(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Measure top-1 accuracy.

    Args:
        network: maps float32 (N, 1, 28, 28) to logits; switched to evaluation mode.
        images: float32 (N, 1, 28, 28).
        labels: int64 (N,).

    Returns:
        Percent of the images classified correctly.
    """
    network.eval()
    right = sum(
        int((network(part).argmax(1) == truth).sum()) for part, truth in zip(images.split(500), labels.split(500), strict=True)
    )
    return 100.0 * right / len(images)


def divide(count: int, recipe: Recipe, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Hold images out.

    Args:
        count: training images.
        recipe: says how many.
        generator: source of randomness; a new one with the recipe's seed gives the division that the weights came from.

    Returns:
        Indices of the validation images and of those trained on, int64.
    """
    order = torch.randperm(count, generator=generator)
    return order[: recipe.validation_images], order[recipe.validation_images :]


def _optimiser(network: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """Give matrices and filters weight decay, vectors none."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=recipe.peak_learning_rate, momentum=0.9, nesterov=True)


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def train(images: np.ndarray, labels: np.ndarray, recipe: Recipe, out: Path) -> nn.Module:
    """Train a network and write the averaged weights after every epoch.

    Args:
        images: all training images, uint8 (60000, 28, 28).
        labels: int64 (60000,).
        recipe: hyperparameters.
        out: the safetensors file to write.

    Returns:
        The network with the averaged weights, in evaluation mode.
    """
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    held, used = divide(len(images), recipe, generator)
    everything, truth = normalise(images), torch.from_numpy(labels)
    full = everything[used]
    small = F.interpolate(full, size=(recipe.small_side,) * 2, mode="bilinear", antialias=True)

    network = DemoNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(recipe.average_decay), use_buffers=True)
    optimiser = _optimiser(network, recipe)
    steps = recipe.epochs * (len(used) // recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.peak_learning_rate, steps, pct_start=0.2)
    for epoch in range(recipe.epochs):
        started = time.monotonic()
        inputs = small if epoch < int(recipe.epochs * recipe.small_epochs_share) else full
        network.train()
        total = torch.zeros(())
        for batch, wanted in batches(inputs, truth[used], recipe.batch, generator):
            logits = network(batch.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, wanted, label_smoothing=recipe.label_smoothing)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            average.update_parameters(network)
            total += loss.detach()
        validated = accuracy(average.module, everything[held], truth[held])
        _log(
            f"epoch {epoch + 1}/{recipe.epochs}: loss {total.item() * recipe.batch / len(used):.4f}, "
            f"validation {validated:.2f} %, {time.monotonic() - started:.0f} s"
        )
        save(average.module, out)
    return average.module


def save(network: nn.Module, out: Path) -> None:
    """Write a network's weights; `out` is never half-written.

    Args:
        network: its state is written in contiguous memory order.
        out: the safetensors file.
    """
    with write_whole(out) as stream:
        stream.write(serialize({name: value.contiguous() for name, value in network.state_dict().items()}))


def main() -> None:
    """Parse the command line, train, and measure the test images once."""
    parser = argparse.ArgumentParser(description="train qsearch's built-in model on Fashion-MNIST")
    parser.add_argument("--images", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), metavar="DIR")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs, metavar="N")
    parser.add_argument("--out", type=Path, default=DATA / "weights.safetensors", metavar="FILE")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    images, labels = read_images_and_labels(arguments.images, "train")
    network = train(images, labels, Recipe(epochs=arguments.epochs), arguments.out)
    images, labels = read_images_and_labels(arguments.images, "t10k")
    _log(f"test images: {accuracy(network, normalise(images), torch.from_numpy(labels)):.2f} % top-1")


if __name__ == "__main__":
    main()
