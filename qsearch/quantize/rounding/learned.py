"""Learned rounding of a block: integers, scales and biases that bring its output nearest to the float network's.

Block reconstruction as in Li et al. 2021, "BRECQ" (arXiv:2102.05426), section 3.2, of the integers that Nagel et al. 2020,
"Up or down? Adaptive rounding" (arXiv:2004.10568), eq. 21, learn layer by layer. Their soft rounding takes ten thousand steps to
harden. Here learning starts at integers that are good already, those of second order, and goes straight through the
rounding (Bengio et al. 2013, arXiv:1308.3432): a hundred steps do. The block reads what the rounded blocks before it
give, so that it also makes up for them; with the float network's input there is nothing left to gain. A layer alone is a block
of one node, learned by its own output as in AdaRound.

A few images are soon learned by heart. A part of them is therefore held out, and what did best on it is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qsearch.errors import QuantizeError
from qsearch.models.graph import Model, Node
from qsearch.models.interpret import forward
from qsearch.qtype import IntRange
from qsearch.quantize.affine import Affine
from qsearch.quantize.weights import QuantizedWeight

__all__ = ["LEARNED", "LEAST_IMAGES", "BlockData", "LearnSettings", "RoundedLayer", "Roundings", "learn_block", "run_block"]

# (Reader's name, position among its inputs) -> the quantizers that what it reads passes through.
Roundings = Mapping[tuple[str, int], tuple[Affine, ...]]
# What a configuration calls it: block after block, or layer after layer.
LEARNED = ("learned", "learned_layer")
# One image in so many is held out.
HELD_OUT, LEAST_IMAGES = 5, 5
# How far a weight starts from its integer towards its float value, in integers: half would change the integer.
LEANING = 0.45
# Values of a batch's widest tensor, and images of a batch.
BATCH_VALUES, LEAST_BATCH, MOST_BATCH = 2**23, 4, 16


@dataclass(frozen=True)
class LearnSettings:
    """How a block is learned.

    Attributes:
        iterations: Steps of Adam, its rates falling to zero along a cosine.
        checks: How often the held-out images are looked at; until the first time weights stay as they are, since scales
            and biases alone gain as much in some blocks, and never lose.
        weight_rate: Learning rate of weights, in integers.
        slow_rate: Of the logarithms of scales, and of biases as shares of the norm of their channel's weights.
        seed: Of the batches.
    """

    iterations: int = 120
    checks: int = 4
    weight_rate: float = 3e-3
    slow_rate: float = 1e-3
    seed: int = 0

    @property
    def interval(self) -> int:
        """Steps from one check to the next."""
        return max(1, self.iterations // self.checks)

    def share_of_rate(self, step: int) -> float:
        """What is left of a learning rate at a step."""
        return 0.5 * (1 + math.cos(math.pi * step / self.iterations))

    def share_of_weight_rate(self, step: int) -> float:
        """Likewise of the weights'."""
        return 0.0 if step < self.interval else self.share_of_rate(step)


@dataclass(frozen=True, eq=False)
class RoundedLayer:
    """A layer that is rounded.

    Attributes:
        weight: Integers and scales.
        shift: What is added to the layer's bias, float32 (O,): its correction, and what was learned on top.
    """

    weight: QuantizedWeight
    shift: np.ndarray


@dataclass(frozen=True, eq=False)
class BlockData:
    """What a block is learned from.

    Attributes:
        inputs: What the rounded network gives it, float32 (N, ...).
        targets: What the float network passes on there, float32 (N, ...).
        roundings: Quantizers of what its nodes read.
        known: Further values that the rounded network gives it, by name, float32 (N, ...).
    """

    inputs: Tensor
    targets: Tensor
    roundings: Roundings
    known: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, images: slice | Tensor) -> BlockData:
        """The data of some images."""
        known = {name: value[images] for name, value in self.known.items()}
        return replace(self, inputs=self.inputs[images], targets=self.targets[images], known=known)

    def batches(self, size: int) -> Iterator[BlockData]:
        """The data of all images, so many at a time."""
        return (self[slice(start, start + size)] for start in range(0, len(self.inputs), size))


@dataclass
class _State:
    """What is learned of a block, by layer.

    Attributes:
        start: The layers at the start.
        weight: Weights in integers before rounding, float32 (O, I/groups, kh, kw); of layers that are learned.
        log_scale: What the logarithms of the scales grow by, float32 (O, 1, 1, 1); of layers that are learned.
        bias: Biases' shifts, in `unit`, float32 (O,); of every rounded layer.
        unit: Norm of every channel's weights, float32 (O,).
        limits: Range of integers, of layers that are learned.
    """

    model: Model
    start: Mapping[str, RoundedLayer]
    limits: Mapping[str, IntRange]
    weight: dict[str, Tensor] = field(default_factory=dict)
    log_scale: dict[str, Tensor] = field(default_factory=dict)
    bias: dict[str, Tensor] = field(default_factory=dict)
    unit: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, given in self.start.items():
            weight = torch.tensor(self.model.parameters.weight[name])
            self.unit[name] = weight.flatten(1).norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
            self.bias[name] = torch.zeros(len(weight), requires_grad=True)
            if name in self.limits:
                integers, scale = _integers(given.weight), torch.tensor(given.weight.scale).reshape(-1, 1, 1, 1)
                leaning = (weight / scale - integers).clamp(-LEANING, LEANING)
                self.weight[name] = (integers + leaning).requires_grad_()
                self.log_scale[name] = torch.zeros(len(weight), 1, 1, 1, requires_grad=True)

    def integers(self, name: str) -> Tensor:
        if name not in self.weight:
            return _integers(self.start[name].weight)
        limits = self.limits[name]
        return self.weight[name].round().clamp(limits.qmin, limits.qmax)

    def scale(self, name: str) -> Tensor:
        scale = torch.tensor(self.start[name].weight.scale).reshape(-1, 1, 1, 1)
        return scale * self.log_scale[name].exp() if name in self.log_scale else scale

    def parameters(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and biases as the block computes with them, gradients passing straight through the rounding."""
        weights, biases = {}, {}
        for name, given in self.start.items():
            integers = self.integers(name)
            if name in self.weight:
                integers = _straight_through(integers, self.weight[name])
            weights[name] = integers * self.scale(name)
            bias = self.model.parameters.bias[name] + given.shift
            biases[name] = torch.tensor(bias) + self.unit[name] * self.bias[name]
        return weights, biases

    @torch.no_grad()
    def layers(self) -> dict[str, RoundedLayer]:
        """What has been learned so far."""
        found = {}
        for name, given in self.start.items():
            weight = given.weight
            if name in self.weight:
                integers = self.integers(name).permute(0, 2, 3, 1).contiguous().numpy().astype(weight.values.dtype)
                weight = QuantizedWeight(integers, self.scale(name).reshape(-1).numpy().copy())
            shift = given.shift + (self.unit[name] * self.bias[name]).numpy()
            found[name] = RoundedLayer(weight, shift.astype(np.float32))
        return found


def learn_block(
    block: Model, start: Mapping[str, RoundedLayer], limits: Mapping[str, IntRange], data: BlockData, settings: LearnSettings
) -> dict[str, RoundedLayer]:
    """Learn a block.

    Args:
        block: The block, with the float network's parameters.
        start: Layer name -> its rounding to start from, of every layer that is not float.
        limits: Layer name -> range of its integers, of the layers whose integers and scales are learned; of the other
            rounded ones the biases are.
        data: What it reads and shall give.
        settings: How to learn.

    Returns:
        Layer name -> the layer, for all of `start`; with the least error on the held-out images that was met, which may
        be that of the start.

    Raises:
        QuantizeError: There are too few images, or the error is not finite.
    """
    count = len(data.inputs)
    if count < LEAST_IMAGES:
        raise QuantizeError(f"learned rounding needs at least {LEAST_IMAGES} calibration images, got {count}: give it more")
    state, size = _State(block, start, limits), _batch_size(block)
    learning = count - max(1, count // HELD_OUT)
    held_out = data[slice(learning, count)]
    # The start is what was given, not what it leans towards.
    best, kept = _error(state, held_out, size), state.layers()
    if not np.isfinite(best):
        raise QuantizeError(f"block {block.name!r} gives NaN or infinity before learning; check its weights and ranges")
    slow = [*state.log_scale.values(), *state.bias.values()]
    groups = [
        {"params": list(state.weight.values()), "lr": settings.weight_rate},
        {"params": slow, "lr": settings.slow_rate},
    ]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [settings.share_of_weight_rate, settings.share_of_rate])
    generator = torch.Generator().manual_seed(settings.seed)
    for step in range(1, settings.iterations + 1):
        drawn = torch.randperm(learning, generator=generator)[:size]
        batch = data[drawn]
        loss = F.mse_loss(_run(state, batch), batch.targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % settings.interval == 0 and (error := _error(state, held_out, size)) < best:
            best, kept = error, state.layers()
    return kept


@torch.no_grad()
def run_block(
    block: Model,
    inputs: Tensor,
    roundings: Roundings,
    layers: Mapping[str, RoundedLayer],
    known: Mapping[str, Tensor] = MappingProxyType({}),
) -> Tensor:
    """Run a block over all images, a few at a time.

    Args:
        block: The block.
        inputs: float32 (N, ...).
        roundings: Quantizers of what its nodes read; none for the float network.
        layers: Rounded layers; others compute in float.
        known: Further values that it reads, by name, float32 (N, ...).

    Returns:
        float32 (N, ...).
    """
    weights = {name: _integers(one.weight) * torch.tensor(one.weight.scale).reshape(-1, 1, 1, 1) for name, one in layers.items()}
    bias = block.parameters.bias | {name: block.parameters.bias[name] + one.shift for name, one in layers.items()}
    shifted = replace(block, parameters=replace(block.parameters, bias=bias))
    parts = BlockData(inputs, inputs, roundings, known).batches(_batch_size(block))
    return torch.cat([_forward(shifted, part, weights) for part in parts])


def _forward(model: Model, data: BlockData, weights: Mapping[str, Tensor]) -> Tensor:
    def read(node: Node, position: int, value: Tensor) -> Tensor:
        return _read(node, position, value, data.roundings)

    return forward(model, data.inputs, known=data.known, read=read, weight=weights)


def _run(state: _State, data: BlockData) -> Tensor:
    weights, biases = state.parameters()
    # The interpreter takes tensors in place of arrays, see `forward`.
    table = cast(dict[str, np.ndarray], {**state.model.parameters.bias, **biases})
    model = replace(state.model, parameters=replace(state.model.parameters, bias=table))
    return _forward(model, data, weights)


@torch.no_grad()
def _error(state: _State, data: BlockData, size: int) -> float:
    """Mean squared error of the block's output."""
    total = sum(float(F.mse_loss(_run(state, part), part.targets, reduction="sum")) for part in data.batches(size))
    return total / data.targets.numel()


def _read(node: Node, position: int, value: Tensor, roundings: Roundings) -> Tensor:
    for affine in roundings.get((node.name, position), ()):
        scale, zero = float(affine.scale), affine.zero_point
        whole = (value.detach() / scale).round_().clamp_(affine.limits.qmin - zero, affine.limits.qmax - zero)
        value = _straight_through(whole.mul_(scale), value)
    return value


def _straight_through(rounded: Tensor, value: Tensor) -> Tensor:
    """The rounded value, with the gradient of the value."""
    return value + (rounded - value).detach() if value.requires_grad else rounded


def _integers(weight: QuantizedWeight) -> Tensor:
    return torch.tensor(weight.values.transpose(0, 3, 1, 2).astype(np.float32))


def _batch_size(block: Model) -> int:
    widest = max(int(np.prod(node.shape[1:])) for node in block.graph.nodes)
    return max(LEAST_BATCH, min(MOST_BATCH, BATCH_VALUES // widest))
