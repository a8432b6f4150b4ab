"""The fake-quantized network: the layer graph in torch, what the compiled module rounds rounded with gradients.

It is run by the interpreter that also runs the float model and learned rounding; what is trained of it goes through the same
lowering as every other configuration (`TunedModel`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from qsearch.config import QuantConfig
from qsearch.models.graph import Model, Node
from qsearch.models.interpret import forward
from qsearch.qat.lsq import fake_quantize, rounded_through
from qsearch.qat.plan import QatPlan, Ranges, ValueQuantizer
from qsearch.quantize.lower import lower
from qsearch.quantize.program import Program
from qsearch.quantize.rounding.learned import RoundedLayer
from qsearch.quantize.weight_store import WeightStore
from qsearch.quantize.weights import QuantizedWeight

__all__ = ["FakeQuantizedNetwork", "TunedModel"]

# In one training no step becomes smaller or larger than its start by this factor: none vanishes, whatever the rates.
MOST_CHANGE = 64.0


@dataclass(frozen=True, eq=False)
class TunedModel:
    """What fine-tuning hands to the lowering.

    Attributes:
        model: The model with the trained weights and biases.
        config: The configuration.
        ranges: Node name -> (low, high) of its value, of the learned steps.
        layers: Layer name -> integers and learned scales, of layers with 8-bit activations.
    """

    model: Model
    config: QuantConfig
    ranges: Ranges
    layers: Mapping[str, RoundedLayer]

    def lower(self) -> Program:
        """The integer program.

        Raises:
            QuantizeError: A tensor or layer cannot be represented.
        """
        # Nothing was prepared of these weights before, and their biases were trained: there is no mean to correct.
        return lower(self.model, self.config, self.ranges, WeightStore(), {}, self.layers)


class FakeQuantizedNetwork:
    """A configuration of a model while it is trained.

    Weights are held in units of their output channel's size or of their step, whichever is larger, biases in that of the
    weights' norm, and steps as logarithms of their change: one rate of Adam, whose strides do not follow the size of
    gradients, suits all of them.

    Args:
        plan: What is rounded.
    """

    def __init__(self, plan: QatPlan) -> None:
        self.plan = plan
        tables = plan.model.parameters
        self.trained: dict[str, Tensor] = {}
        self._size: dict[str, Tensor] = {}
        self._norm: dict[str, Tensor] = {}
        for node in plan.model.graph.layers:
            weight, bias = torch.tensor(tables.weight[node.name]), torch.tensor(tables.bias[node.name])
            size = weight.flatten(1).square().mean(1).sqrt()
            # A channel without weights, pruned for instance, gets the unit of the others.
            live = size[size > 0]
            size = torch.where(size > 0, size, live.mean() if len(live) else torch.tensor(1.0))
            if node.name in plan.weights:
                # Strides much below a step change nothing: channels that one step for the layer has rounded away come back.
                size = torch.maximum(size, torch.from_numpy(plan.weights[node.name].scale).reshape(-1))
            norm = size * weight[0].numel() ** 0.5
            self._size[node.name], self._norm[node.name] = size.reshape(-1, 1, 1, 1), norm
            self.trained[f"weight:{node.name}"] = weight / self._size[node.name]
            self.trained[f"bias:{node.name}"] = bias / norm
            if node.name in plan.weights and plan.weights[node.name].learned:
                self.trained[f"weight_step:{node.name}"] = torch.zeros(plan.weights[node.name].scale.shape)
        for root in plan.steps:
            self.trained[f"step:{root}"] = torch.zeros(())
        for value in self.trained.values():
            value.requires_grad_()

    @torch.no_grad()
    def settle(self) -> None:
        """Keep steps within bounds; after every step of training."""
        bound = float(np.log(MOST_CHANGE))
        for name, value in self.trained.items():
            if name.startswith(("step:", "weight_step:")):
                value.clamp_(-bound, bound)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits, float32 (N, classes), of images, float32 (N, C, H, W); with gradients where torch records them."""
        weights, biases = self._parameters()
        return forward(self.plan.model, images, read=self._read, weight=weights, bias=biases)

    @torch.no_grad()
    def tuned(self) -> TunedModel:
        """What has been trained, as lowering takes it."""
        weights, biases = dict(self.plan.model.parameters.weight), dict(self.plan.model.parameters.bias)
        layers = {}
        for name in weights:
            weight, bias = self._weight(name), self.trained[f"bias:{name}"] * self._norm[name]
            weights[name], biases[name] = weight.numpy().copy(), bias.numpy().copy()
            if name in self.plan.weights:
                step, limits = self._weight_step(name), self.plan.weights[name].limits
                whole = (weight / step).clamp(limits.qmin, limits.qmax).round().permute(0, 2, 3, 1).contiguous()
                scale = step.reshape(-1).expand(len(weight)).numpy().copy()
                integers = QuantizedWeight(whole.numpy().astype(limits.dtype), scale)
                layers[name] = RoundedLayer(integers, np.zeros(len(weight), np.float32))
        parameters = replace(self.plan.model.parameters, weight=weights, bias=biases)
        steps = {root: np.float32(self._root_step(root).item()) for root in self.plan.steps}
        model = replace(self.plan.model, parameters=parameters)
        return TunedModel(model, self.plan.config, self.plan.trained_ranges(steps), layers)

    def state(self) -> dict[str, Tensor]:
        """Copies of all that is trained, by name."""
        return {name: value.detach().clone() for name, value in self.trained.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for name, value in self.trained.items():
            value.copy_(state[name])

    def _weight(self, name: str) -> Tensor:
        return self.trained[f"weight:{name}"] * self._size[name]

    def _weight_step(self, name: str) -> Tensor:
        start = torch.from_numpy(self.plan.weights[name].scale)
        change = self.trained.get(f"weight_step:{name}")
        return start if change is None else start * change.exp()

    def _root_step(self, root: str) -> Tensor:
        return self.trained[f"step:{root}"].exp() * float(self.plan.steps[root])

    def _step(self, one: ValueQuantizer) -> Tensor:
        step = self._root_step(one.root)
        return step if one.ratio == 1.0 else step * one.ratio

    def _parameters(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and biases as the module computes with them."""
        weights, biases = {}, {}
        for name, norm in self._norm.items():
            weight, bias = self._weight(name), self.trained[f"bias:{name}"] * norm
            if name in self.plan.weights:
                one = self.plan.weights[name]
                step = self._weight_step(name)
                weight = fake_quantize(weight, step, one.limits.qmin, one.limits.qmax)
                bias = rounded_through(bias, step.detach().reshape(-1) * self._step(one.reads).detach())
            weights[name], biases[name] = weight, bias
        return weights, biases

    def _read(self, node: Node, position: int, value: Tensor) -> Tensor:
        if value.dim() == 4:
            # Convolutions of images with a single channel give up the order that all others are fastest in.
            value = value.contiguous(memory_format=torch.channels_last)
        for one in self.plan.reads.get((node.name, position), ()):
            value = fake_quantize(value, self._step(one), one.low, one.high)
        return value
