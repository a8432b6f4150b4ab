"""Small classifiers, all but the first of which qsearch must refuse; named on the command line as broken_networks:NAME."""

from __future__ import annotations

import sys

import torch
from torch import nn

PREPROCESSING = {"resize": None, "crop": [16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "channels": 3}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.head = nn.Linear(16, 2)

    def features(self, x):
        return torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


class TwoInputs(Net):
    def forward(self, x, y):
        return self.head(self.features(x + y))


class ControlFlow(Net):
    def forward(self, x):
        return self.head(self.features(x * 2 if x.sum() > 0 else x))


class NotAClassifier(Net):
    def forward(self, x):
        return self.first(x)


class TwoOutputs(Net):
    def forward(self, x):
        return self.head(self.features(x)), x


class ClassIndex(Net):
    def forward(self, x):
        return self.head(self.features(x)).argmax(1)


class NoBatch(Net):
    def forward(self, x):
        return self.head(self.features(x))[0]


class Complex(Net):
    def forward(self, x):
        return self.head(torch.fft.fft2(self.second(self.first(x))).abs().mean((2, 3)))


class Sorted(Net):
    def forward(self, x):
        return self.head(torch.sort(self.features(x), dim=1).values)


class Logarithm(Net):
    def forward(self, x):
        return self.head(torch.log(self.features(x) - 0.2))


class NoLayers(nn.Module):
    def forward(self, x):
        return x[:, :2].mean((2, 3))


def nan_weight() -> nn.Module:
    net = Net()
    net.second.weight.data[0, 0, 0, 0] = float("nan")
    return net


def overflow() -> nn.Module:
    net = Net()
    net.first.weight.data *= 1e30
    net.second.weight.data *= 1e30
    return net


def half_precision() -> nn.Module:
    return Net().half()


def raises() -> nn.Module:
    raise RuntimeError("the weights are elsewhere")


def exits() -> nn.Module:
    sys.exit(3)


def not_a_module() -> int:
    return 3


def a_class() -> type:
    return nn.Linear
