"""A network short enough to measure every configuration of its search space: five convolutions, a residual, a linear layer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from qsearch.data import load_dataset
from qsearch.models.demo import CLASSES, PREPROCESSING, load_images
from qsearch.models.demo.network import ConvNormActivation, InvertedResidual
from qsearch.models.demo.train import batches, normalise, save
from qsearch.search.space import SearchSpace

__all__ = ["CLASSES", "PREPROCESSING", "SPACE", "build", "train"]

CHANNELS, EXPANSION, HEAD_CHANNELS = 24, 4, 96
# Standard deviations of the natural logarithm of the channels' scales behind expansion, depthwise and last convolution.
SPREADS = (1.2, 1.0, 1.2)
EPOCHS, BATCH, LEARNING_RATE = 8, 64, 0.01

# 3 precisions of the first layer, 4^3 of the other plain convolutions, 2^2 of the rest, four settings: 3072 combinations.
SPACE = SearchSpace.model_validate(
    {
        "version": 1,
        "name": "small",
        "precisions": {
            "default": ["fp32", "int16", "int8", "w4a8"],
            "types": {"depthwise": ["fp32", "int8"], "dense": ["fp32", "int8"]},
            "layers": {"features.0.0": ["fp32", "int16", "int8"]},
        },
        "calibration": {"modes": ["max", "mse"]},
        "granularities": ["channel_wise", "layer_wise"],
    }
)


class SmallNet(nn.Module):
    """Float32 (N, 1, 28, 28) to logits, float32 (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvNormActivation(1, CHANNELS, 3, 2),
            InvertedResidual(CHANNELS, CHANNELS, 1, EXPANSION),
            ConvNormActivation(CHANNELS, HEAD_CHANNELS, 3, 2),
        )
        self.classifier = nn.Linear(HEAD_CHANNELS, len(CLASSES))
        for layer in (self.features[0], *self.features[1].conv[:2], self.features[2]):
            # A bound such as ReLU6's would not let channels be scaled.
            layer[2] = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def build() -> nn.Module:
    """The network without its weights; `--model small_network:build` finds it."""
    return SmallNet()


def train(out: Path) -> None:
    """Train on the built-in images that a search never scores trials on, half a minute on one core, and write the weights."""
    held = list(load_dataset("demo", PREPROCESSING, CLASSES).indices("heldout"))
    images, labels = load_images()
    inputs, truth = normalise(images[held]), torch.from_numpy(labels[held])
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = SmallNet()
    optimiser = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, EPOCHS * (len(held) // BATCH))
    for _ in range(EPOCHS):
        for batch, wanted in batches(inputs, truth, BATCH, generator):
            optimiser.zero_grad()
            F.cross_entropy(network(batch), wanted).backward()
            optimiser.step()
            schedule.step()
    spread_channels(network, generator)
    save(network, out)


@torch.no_grad()
def spread_channels(network: SmallNet, generator: torch.Generator) -> None:
    """Give channels of one tensor very different ranges without changing what the network computes.

    Pretrained mobile networks have such channels, and lose by them at 8 bits (Nagel et al. 2019, "Data-free quantization
    through weight equalization and bias correction"). A ReLU passes a channel's scale on to the next layer's weights. Without
    this every layer would do with int8, and the front would be a single corner.
    """
    block, last = network.features[1].conv, network.features[2]
    expand, depthwise, project = block[0], block[1], block[2]
    for spread, norm, following, axis in (
        (SPREADS[0], expand[1], depthwise[0], 0),
        (SPREADS[1], depthwise[1], project, 1),
        (SPREADS[2], last[1], network.classifier, 1),
    ):
        scale = torch.exp(spread * torch.randn(norm.num_features, generator=generator))
        norm.weight *= scale
        norm.bias *= scale
        shape = [1] * following.weight.ndim
        shape[axis] = -1
        following.weight /= scale.view(shape)
