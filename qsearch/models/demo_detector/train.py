"""Train the built-in detector: `python -m qsearch.models.demo_detector.train`.

The weights in `data/` come from this script with its default arguments. One thread count gives one result.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from qsearch.models.demo.images import read_images_and_labels
from qsearch.models.demo.train import save
from qsearch.models.demo_detector import PREPROCESSING
from qsearch.models.demo_detector.network import STRIDE, DemoDetector
from qsearch.models.demo_detector.scenes import SIDE, Scene, compose_all

__all__ = ["Recipe", "Targets", "assign", "loss_of", "main", "train"]

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters.

    Attributes:
        steps: Batches.
        batch: Scenes per batch, each composed anew.
        peak_learning_rate: Highest value of the one-cycle schedule.
        weight_decay: Of AdamW.
        average_decay: Per-step decay of the averaged weights, which are the result.
        radius: A position belongs to a garment if it is within so many strides of its centre, in both directions.
        box_weight: Of the box loss against the class loss.
        seed: Of the scenes and the initial weights.
    """

    steps: int = 3600
    batch: int = 32
    peak_learning_rate: float = 4e-3
    weight_decay: float = 1e-2
    average_decay: float = 0.998
    radius: float = 1.0
    box_weight: float = 2.0
    seed: int = 0


@dataclass(frozen=True)
class Targets:
    """What the network should say of a batch.

    Attributes:
        boxes: The garment's edges in pixels, float32 (N, positions, 4); anything at background.
        classes: int64 (N, positions); -1 at background.
    """

    boxes: torch.Tensor
    classes: torch.Tensor


def centres() -> torch.Tensor:
    """Where the positions lie: x and y in pixels, float32 (positions, 2), row by row."""
    steps = (torch.arange(SIDE // STRIDE) + 0.5) * STRIDE
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def assign(scenes: tuple[Scene, ...], radius: float) -> Targets:
    """Give every position the smallest of the garments that it lies in and near the centre of.

    Args:
        scenes: A batch.
        radius: In strides.
    """
    points = centres()
    boxes, classes = [], []
    for scene in scenes:
        edges, names = torch.from_numpy(scene.boxes), torch.from_numpy(scene.classes)
        middle, extent = (edges[:, :2] + edges[:, 2:]) / 2, edges[:, 2:] - edges[:, :2]
        near = torch.minimum(extent / 2, torch.full_like(extent, radius * STRIDE))
        inside = ((points[:, None] - middle).abs() < near).all(2)
        smallest = torch.where(inside, extent.prod(1), torch.inf).argmin(1)
        boxes.append(edges[smallest])
        classes.append(torch.where(inside.any(1), names[smallest], -1))
    return Targets(torch.stack(boxes), torch.stack(classes))


def generalized_iou(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlap of boxes pair by pair.

    Args:
        a: float32 (n, 4), edges.
        b: float32 (n, 4), edges.

    Returns:
        Intersection over union, and Rezatofighi et al. 2019, algorithm 1, which has a slope for boxes apart; float32 (n,).
    """
    area_a, area_b = ((one[:, 2:] - one[:, :2]).prod(1) for one in (a, b))
    shared = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp_min(0).prod(1)
    around = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(1)
    union = area_a + area_b - shared
    iou = shared / union
    return iou, iou - (around - union) / around


def loss_of(outputs: torch.Tensor, targets: Targets, box_weight: float) -> torch.Tensor:
    """Quality focal loss of the classes plus the boxes' generalized IoU loss, per positive position.

    The score that a class should have is how well the box fits (Li et al., "Generalized focal loss", 2020, equation 2
    with exponent 2), so that of two boxes of one garment the better one is kept.

    Args:
        outputs: float32 (N, positions, 4 + classes).
        targets: What they should be.
        box_weight: Of the second term.
    """
    positive = targets.classes >= 0
    distances = outputs[..., :4][positive].clamp_max(6).exp() * STRIDE
    points = centres().expand(len(outputs), -1, 2)[positive]
    boxes = torch.cat([points - distances[:, :2], points + distances[:, 2:]], 1)
    iou, generalized = generalized_iou(boxes, targets.boxes[positive])
    logits = outputs[..., 4:]
    wanted = torch.zeros_like(logits)
    wanted[positive, targets.classes[positive]] = iou.detach()
    weight = (logits.detach().sigmoid() - wanted) ** 2
    classes = (weight * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")).sum()
    return (classes + box_weight * (1 - generalized).sum()) / max(int(positive.sum()), 1)


def normalise(scenes: tuple[Scene, ...]) -> torch.Tensor:
    """Scale scenes as the network wants them: float32 (N, 1, SIDE, SIDE)."""
    images = torch.from_numpy(np.stack([scene.image for scene in scenes]))
    return ((images.float() / 255 - PREPROCESSING.mean[0]) / PREPROCESSING.std[0]).unsqueeze(1)


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def train(images: np.ndarray, labels: np.ndarray, recipe: Recipe, out: Path) -> nn.Module:
    """Train a network on scenes composed as it goes, and write the averaged weights.

    Args:
        images: Garments, uint8 (n, 28, 28).
        labels: int64 (n,).
        recipe: Hyperparameters.
        out: The safetensors file to write.

    Returns:
        The network with the averaged weights, in evaluation mode.
    """
    torch.manual_seed(recipe.seed)
    random = np.random.default_rng(recipe.seed)
    network = DemoDetector().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(recipe.average_decay), use_buffers=True)
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=recipe.peak_learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.peak_learning_rate, recipe.steps, pct_start=0.15)
    started, total = time.monotonic(), 0.0
    for step in range(1, recipe.steps + 1):
        scenes = compose_all(images, labels, recipe.batch, random)
        outputs = network(normalise(scenes).contiguous(memory_format=torch.channels_last))
        loss = loss_of(outputs, assign(scenes, recipe.radius), recipe.box_weight)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimiser.step()
        schedule.step()
        average.update_parameters(network)
        total += float(loss.detach())
        if step % 200 == 0 or step == recipe.steps:
            _log(f"step {step}/{recipe.steps}: loss {total / 200:.4f}, {time.monotonic() - started:.0f} s")
            total = 0.0
            save(average.module, out)
    return average.module.eval()


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="train qsearch's built-in detector on scenes of Fashion-MNIST")
    parser.add_argument("--images", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), metavar="DIR")
    parser.add_argument("--steps", type=int, default=Recipe.steps, metavar="N")
    parser.add_argument("--out", type=Path, default=DATA / "weights.safetensors", metavar="FILE")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    images, labels = read_images_and_labels(arguments.images, "train")
    train(images, labels, Recipe(steps=arguments.steps), arguments.out)


if __name__ == "__main__":
    main()
