"""Small networks that between them use every operation with a lowering of its own, and one that has none."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers_tiny import ConvNext, VisionTransformer, WindowTransformer

from qsearch.calibrate.observe import observe
from qsearch.calibrate.ranges import activation_ranges
from qsearch.config import QuantConfig
from qsearch.models.graph import Model
from qsearch.models.import_torch import import_model

SHAPE = (1, 3, 12, 10)


class Residual(nn.Module):
    """Inverted residual, strided pooling, a residual across a skip, uneven padding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 10, 3, 2, 1, bias=False), nn.BatchNorm2d(10), nn.ReLU6())
        self.expand = nn.Sequential(nn.Conv2d(10, 24, 1), nn.BatchNorm2d(24), nn.ReLU())
        self.depth = nn.Sequential(nn.Conv2d(24, 24, 3, 1, 1, groups=24), nn.BatchNorm2d(24), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(24, 10, 1), nn.BatchNorm2d(10))
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.pad = nn.ZeroPad2d((0, 1, 1, 0))
        self.grouped = nn.Conv2d(10, 20, 3, 1, 0, groups=2)
        self.head = nn.Linear(20, 7)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(self.depth(self.expand(x)))
        x = torch.relu(self.grouped(self.pad(self.pool(x))))
        return self.head(x.mean((2, 3)))


class Bottlenecks(nn.Module):
    """Residuals of whole vectors of channels: added across an identity, across a strided branch, and to a layer's own input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        self.inner = nn.ModuleList(nn.Sequential(nn.Conv2d(32, 16, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 1, 1)) for _ in range(2))
        self.side, self.main, self.own = nn.Conv2d(32, 64, 1, 2), nn.Conv2d(32, 64, 3, 2, 1), nn.Conv2d(64, 64, 1)
        self.head = nn.Linear(64, 7)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        for inner in self.inner:
            x = torch.relu(x + inner(x))
        x = torch.relu(self.main(x) + self.side(x))
        x = torch.relu(x + self.own(x))
        return self.head(x.mean((2, 3)))


class Excite(nn.Module):
    """Squeeze and excite, hard-swish, SiLU, concatenation, average pooling, flatten of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(3, 9, 5, padding=2, dilation=1)
        self.squeeze, self.excite = nn.Conv2d(17, 4, 1), nn.Conv2d(4, 17, 1)
        self.gate, self.swish, self.silu = nn.Hardsigmoid(), nn.Hardswish(), nn.SiLU()
        self.pool, self.global_pool = nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(17 * 6 * 5, 5)

    def forward(self, x):
        x = torch.cat([self.swish(self.a(x)), self.silu(self.b(x))], 1)
        x = x * self.gate(self.excite(torch.relu(self.squeeze(self.global_pool(x)))))
        return self.head(torch.flatten(self.pool(x), 1))


class Foreign(nn.Module):
    """Operators without a lowering of their own between integer layers: layer norm, leaky ReLU; a channel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 1)
        self.leaky, self.norm, self.head = nn.LeakyReLU(0.1), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.leaky(self.first(x))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        left, right = x.chunk(2, 1)
        x = self.second(torch.cat([right, left], 1))
        return self.head(self.norm(x.mean((2, 3))))


class Shuffle(nn.Module):
    """Two shuffled units, a slice, nested concatenation: selections of channels that compose."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 20, 3, 2, 1, bias=False), nn.BatchNorm2d(20), nn.ReLU())
        self.units = nn.ModuleList(nn.Conv2d(10, 10, 1) for _ in range(2))
        self.mix = nn.ModuleList(nn.Conv2d(20, width, 1) for width in (3, 5, 4))
        self.head = nn.Linear(14, 6)

    def forward(self, x):
        x = self.stem(x)
        n, c, h, w = x.shape
        for unit in self.units:
            left, right = x.chunk(2, 1)
            x = torch.cat([left, torch.relu(unit(right))], 1)
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        a, b, d = (mix(x) for mix in self.mix)
        x = torch.cat([torch.cat([a, b], 1), d, x[:, 3:5]], 1)
        return self.head(x.mean((2, 3)))


NETWORKS = {
    "residual": Residual,
    "bottlenecks": Bottlenecks,
    "excite": Excite,
    "foreign": Foreign,
    "shuffle": Shuffle,
    "vit": VisionTransformer,
    "swin": WindowTransformer,
    "convnext": ConvNext,
}


def network(name: str, batch: int = 1) -> tuple[Model, nn.Module]:
    """A network, imported for so many images an inference, and the torch module it came from, with settled batch norm."""
    # Whatever a test draws next does not depend on whether another one has asked for the network before.
    torch.manual_seed(0)
    return _network(name, batch)


@cache
def _network(name: str, batch: int) -> tuple[Model, nn.Module]:
    module = NETWORKS[name]()
    module.train()
    with torch.no_grad():
        for _ in range(3):
            module(torch.randn(16, *SHAPE[1:]))
    module.eval()
    return import_model(name, module, (batch, *SHAPE[1:])), module


class Named(dict[str, Any]):
    """Something of every network, made when it is first asked for: all of it takes as long as dozens of tests."""

    def __init__(self, make: Callable[[str], Any]) -> None:
        self._make = make

    def __missing__(self, name: str) -> Any:
        self[name] = self._make(name)
        return self[name]


def images(count: int, seed: int = 0) -> np.ndarray:
    """Random images, float32 (count, C, H, W)."""
    return np.random.default_rng(seed).standard_normal((count, *SHAPE[1:])).astype(np.float32)


def ranges_of(model: Model, config: QuantConfig) -> dict[str, tuple[float, float]]:
    """Activation ranges from 32 random images."""
    return activation_ranges(observe(model, images(32), 16), model, config.calibration, (-6.0, 6.0))


MODELS = Named(lambda name: network(name)[0])
RANGES = Named(lambda name: ranges_of(MODELS[name], QuantConfig()))
