"""A small anchor-free detector on a MobileNetV2-style backbone, for grey scenes of 80x80 pixels."""

from __future__ import annotations

import math

import torch
from torch import nn

from qsearch.models.demo.network import ConvNormActivation, InvertedResidual

__all__ = ["STRIDE", "DemoDetector"]

STRIDE = 8
"""Pixels between neighbouring positions of the output."""

STEM_CHANNELS = 16
# Expansion, output channels, blocks, stride of the first block.
STAGES = ((1, 16, 1, 1), (4, 24, 2, 2), (4, 48, 3, 2), (4, 64, 2, 1))
# Every position starts as background with this probability of each class (Lin et al., "Focal loss", 2017, section 4.1).
PRIOR = 0.01


class DemoDetector(nn.Module):
    """One prediction per position of a 10x10 grid, in the manner of FCOS (Tian et al. 2019) with one level.

    Where FCOS learns how central a position is, the class score itself says here how well its box fits, see `train`.
    """

    def __init__(self, num_classes: int = 10) -> None:
        """Build the network with freshly initialised weights.

        Args:
            num_classes: kinds of things.
        """
        super().__init__()
        blocks: list[nn.Module] = [ConvNormActivation(1, STEM_CHANNELS, 3, 2)]
        channels = STEM_CHANNELS
        for expansion, outputs, repeats, first_stride in STAGES:
            for index in range(repeats):
                stride = first_stride if index == 0 else 1
                blocks.append(InvertedResidual(channels, outputs, stride, expansion))
                channels = outputs
        self.features = nn.Sequential(*blocks)
        self.box_branch = _branch(channels)
        self.box_head = nn.Conv2d(channels, 4, 1)
        self.class_branch = _branch(channels)
        self.class_head = nn.Conv2d(channels, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        for head, bias in ((self.box_head, 1.0), (self.class_head, -math.log((1 - PRIOR) / PRIOR))):
            nn.init.normal_(head.weight, std=0.01)
            assert head.bias is not None
            nn.init.constant_(head.bias, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float32 (N, 1, 80, 80) to float32 (N, 100, 4 + classes), rows of the grid one after the other.

        The first four numbers are logarithms of the distances from the position to the left, top, right and bottom
        edge of the box, in strides; the others are logits, one per class.
        """
        x = self.features(x)
        boxes, classes = self.box_head(self.box_branch(x)), self.class_head(self.class_branch(x))
        return torch.cat([boxes, classes], 1).flatten(2).transpose(1, 2)


def _branch(channels: int) -> nn.Sequential:
    return nn.Sequential(ConvNormActivation(channels, channels, 3, groups=channels), ConvNormActivation(channels, channels, 1))
