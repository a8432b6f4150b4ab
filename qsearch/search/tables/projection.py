"""How far every rounded read and every rounded weight moves the outputs, along one random direction per image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qsearch.measure.task import BOX_DEVIATION
from qsearch.models.graph import Model, Node
from qsearch.models.interpret import forward
from qsearch.quantize.perturbation import Edge, Roundings, rounded

__all__ = ["Projection", "Rounded", "box_direction", "fisher_direction", "project"]


@dataclass(frozen=True)
class Rounded:
    """Everything whose rounding is asked about.

    Attributes:
        reads: Reads and what rounds them.
        weights: Layer name -> float32 (K, O, I/groups, kh, kw): changes of its weights.
        biases: Layer name -> float32 (K, O): changes of its bias.
    """

    reads: tuple[tuple[Edge, Roundings], ...]
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]


@dataclass(frozen=True)
class Projection:
    """What one image tells; or several, along a second axis.

    Attributes:
        reads: float32 (reads,): movement of the outputs for each rounded read.
        weights: float32 (weights,): the same for each change of a weight, layer by layer.
        biases: float32 (biases,): the same for each change of a bias.
    """

    reads: np.ndarray
    weights: np.ndarray
    biases: np.ndarray


def fisher_direction(logits: Tensor, signs: Tensor) -> Tensor:
    """Draw v with E[v v'] = diag(p) - p p', the Fisher matrix of the logits.

    v = L e, with L the Cholesky factor of the multinomial's covariance, classes from the likeliest down (Tanabe and
    Sagae 1992, theorem 1): with t_k the probability of the classes after the k-th,
    L_kk = sqrt(p_k t_k / t_(k-1)) and L_jk = -p_j L_kk / t_k below it.

    Args:
        logits: float32 (N, classes).
        signs: float32 (N, classes) of independent signs, e.

    Returns:
        float32 (N, classes).
    """
    p, order = logits.double().softmax(1).sort(1, descending=True)
    least = torch.finfo(torch.float64).tiny
    tail = p.flip(1).cumsum(1).flip(1).clamp_min(least)
    after = torch.cat([tail[:, 1:], torch.zeros_like(tail[:, :1])], 1)
    drawn = (p * after / tail).sqrt() * signs
    below = (drawn / after.clamp_min(least)).cumsum(1) - drawn / after.clamp_min(least)
    return torch.zeros_like(p).scatter(1, order, drawn - p * below).float()


def box_direction(outputs: Tensor, signs: Tensor) -> Tensor:
    """Like `fisher_direction`, of a detector: v' dz squared is on average twice the divergence that `box_divergence` measures.

    A logit says yes or no on its own, with variance p (1 - p); a number of a box is normal with deviation BOX_DEVIATION,
    and counts by the strongest probability of its position.

    Args:
        outputs: float32 (N, positions, 4 + logits).
        signs: float32 of the same shape, independent signs.

    Returns:
        float32 of the same shape.
    """
    p = outputs[..., 4:].double().sigmoid()
    boxes = (p.amax(-1, keepdim=True).sqrt() / BOX_DEVIATION).expand(*p.shape[:-1], 4)
    return (torch.cat([boxes, (p * (1 - p)).sqrt()], -1) * signs).float()


def project(model: Model, image: Tensor, changes: Rounded, generator: torch.Generator) -> Projection:
    """Measure every change on one image (or one batch of the graph's own size).

    Args:
        model: The model.
        image: float32 (N, C, H, W).
        changes: What is asked about.
        generator: Of the random direction.
    """
    edges = {edge for edge, _ in changes.reads}
    reads: dict[Edge, Tensor] = {}
    own = model.parameters
    weights = {name: torch.tensor(own.weight[name]).requires_grad_() for name in changes.weights}
    biases = {name: torch.tensor(own.bias[name]).requires_grad_() for name in changes.biases}

    def read(node: Node, index: int, value: Tensor) -> Tensor:
        if (node.name, index) in edges:
            # A view of its own gives every read a gradient of its own.
            value = reads[node.name, index] = value.view_as(value)
        return value

    logits = forward(model, image.clone().requires_grad_(), read=read, weight=weights, bias=biases)
    plain = logits.detach()
    drawn = fisher_direction if plain.dim() == 2 else box_direction
    direction = drawn(plain, _signs(plain.shape, generator))
    try:
        found = torch.autograd.grad((logits * direction).sum(), [*reads.values(), *weights.values(), *biases.values()])
    except RuntimeError:
        # An operator without a derivative, or one that cuts the path of the gradient.
        return _projected_directly(model, image, changes, (plain, direction))
    slopes = iter(found)
    of_reads = {edge: next(slopes) for edge in reads}
    of_weights, of_biases = ({name: next(slopes) for name in leaves} for leaves in (weights, biases))
    with torch.no_grad():
        moved = [_dot(rounded(reads[edge], by).sub_(reads[edge]), of_reads[edge]) for edge, by in changes.reads]
        shifted, lifted = _products(changes.weights, of_weights), _products(changes.biases, of_biases)
    return Projection(np.array(moved, np.float32), shifted, lifted)


def _signs(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator).float() * 2 - 1


def _dot(a: Tensor, b: Tensor) -> float:
    if a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last):
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return float(torch.dot(a.reshape(-1), b.reshape(-1)))


def _products(changes: Mapping[str, Tensor], slopes: Mapping[str, Tensor]) -> np.ndarray:
    """The inner product of every change with its layer's slope."""
    found = [by.flatten(1) @ slopes[name].reshape(-1) for name, by in changes.items()]
    return np.array(torch.cat(found)) if found else np.zeros(0, np.float32)


@torch.no_grad()
def _projected_directly(model: Model, image: Tensor, changes: Rounded, outputs: tuple[Tensor, Tensor]) -> Projection:
    """The same without gradients, by running the model once per change."""
    plain, direction = outputs

    def moved(
        read: Callable[[Node, int, Tensor], Tensor] | None = None,
        weight: Mapping[str, Tensor] | None = None,
        bias: Mapping[str, Tensor] | None = None,
    ) -> float:
        return float(((forward(model, image, read=read, weight=weight, bias=bias) - plain) * direction).sum())

    def only(edge: Edge, by: Roundings) -> Callable[[Node, int, Tensor], Tensor]:
        return lambda node, index, value: rounded(value, by) if (node.name, index) == edge else value

    own = model.parameters
    return Projection(
        np.array([moved(read=only(edge, by)) for edge, by in changes.reads], np.float32),
        np.array(
            [moved(weight={of: torch.tensor(own.weight[of]) + by}) for of, some in changes.weights.items() for by in some],
            np.float32,
        ),
        np.array(
            [moved(bias={of: torch.tensor(own.bias[of]) + by}) for of, some in changes.biases.items() for by in some], np.float32
        ),
    )
