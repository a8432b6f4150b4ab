"""torchvision's resnet18 and mobilenet_v2 for the built-in data, trained here: grey images of 28 pixels, ten classes.

Training takes two minutes and seven minutes of one core and happens once: weights are kept in the cache folder, never in the
repository. It reads the 60,000 training images of Debian's `dataset-fashion-mnist`; the built-in images, which everything
is measured on, are the 10,000 test images and are not looked at.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from qsearch.models.demo import CLASSES, PREPROCESSING
from qsearch.models.demo.images import read_images_and_labels
from qsearch.models.demo.train import batches, normalise, save
from qsearch.models.torchvision_import import import_torchvision

__all__ = ["CLASSES", "PREPROCESSING", "RECIPES", "mobilenet_v2", "resnet18", "train", "trained"]

IMAGES = Path("/usr/share/datasets/fashion-mnist")
# Images and passes over them, as many as some minutes allow.
RECIPES = {"resnet18": (20_000, 1), "mobilenet_v2": (60_000, 3)}
BATCH, PEAK_LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 128, 0.1, 5e-4, 0.2


def resnet18() -> nn.Module:
    """torchvision's, with one input channel; `--model fashion_networks:resnet18` finds it."""
    network = import_torchvision().models.resnet18(num_classes=len(CLASSES))
    network.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    return network


def mobilenet_v2() -> nn.Module:
    """torchvision's, with one input channel; `--model fashion_networks:mobilenet_v2` finds it."""
    network = import_torchvision().models.mobilenet_v2(num_classes=len(CLASSES))
    network.features[0][0] = nn.Conv2d(1, 32, 3, 2, 1, bias=False)
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet18": resnet18, "mobilenet_v2": mobilenet_v2}


def trained(name: str, cache: Path, images: Path = IMAGES) -> Path:
    """The weights of a network; trained where the cache folder has none of this very script.

    Args:
        name: One of `NETWORKS`.
        cache: Where weights are kept.
        images: Where the training images lie.

    Raises:
        DataError: There are no training images.
    """
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    weights = cache / f"fashion-{name}-{source}.safetensors"
    if not weights.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        train(name, weights, images)
    return weights


def train(name: str, out: Path, images: Path = IMAGES) -> None:
    """Train a network and write its weights.

    Args:
        name: One of `NETWORKS`.
        out: The safetensors file to write.
        images: Where the training images lie.

    Raises:
        DataError: There are no training images.
    """
    most, epochs = RECIPES[name]
    pixels, labels = read_images_and_labels(images, "train")
    inputs, truth = normalise(pixels[:most]), torch.from_numpy(labels[:most])
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = NETWORKS[name]().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rate, steps = PEAK_LEARNING_RATE, epochs * (len(inputs) // BATCH)
    optimiser = torch.optim.SGD(network.parameters(), rate, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps, pct_start=WARM_UP)
    started = time.monotonic()
    for epoch in range(epochs):
        total = torch.zeros(())
        for batch, wanted in batches(inputs, truth, BATCH, generator):
            loss = F.cross_entropy(network(batch.contiguous(memory_format=torch.channels_last)), wanted)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.detach() * BATCH / len(inputs)
        seconds = time.monotonic() - started
        print(f"{name}: epoch {epoch + 1}, loss {float(total):.3f}, {seconds:.0f} s", file=sys.stderr, flush=True)
    save(network, out)
