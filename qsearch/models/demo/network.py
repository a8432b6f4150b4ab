"""A MobileNetV2-style classifier for 28x28 grey images, small enough to search on a laptop."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["DemoNet"]

STEM_CHANNELS = 24
HEAD_CHANNELS = 256
# Expansion, output channels, blocks, stride of the first block: the (t, c, n, s) table of
# Sandler et al., "MobileNetV2" (2018), table 2, with a single-stride stem since the images are small.
STAGES = ((1, 16, 1, 1), (4, 24, 2, 2), (4, 32, 3, 1), (4, 64, 3, 2), (4, 96, 2, 1))


class ConvNormActivation(nn.Sequential):
    """Convolution, batch norm, ReLU6; children are named 0, 1, 2 as in torchvision."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        """Build the three layers with "same" padding.

        Args:
            inputs: input channels.
            outputs: output channels.
            kernel: odd side of the square kernel, in pixels.
            stride: step in pixels, both directions.
            groups: channel groups; `inputs` makes the convolution depthwise.
        """
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(inplace=False),
        )


class InvertedResidual(nn.Module):
    """Expand 1x1, filter depthwise 3x3, project 1x1 without activation, add the input if shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        """Build one block.

        Args:
            inputs: input channels.
            outputs: output channels.
            stride: stride of the depthwise convolution, 1 or 2.
            expansion: hidden channels per input channel; 1 leaves the expanding convolution out.
        """
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        layers: list[nn.Module] = [] if expansion == 1 else [ConvNormActivation(inputs, hidden, 1)]
        layers += [
            ConvNormActivation(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float32 (N, inputs, H, W) to float32 (N, outputs, H / stride, W / stride)."""
        return x + self.conv(x) if self.residual else self.conv(x)


class DemoNet(nn.Module):
    """The built-in model: 34 convolutions and one linear layer, 19.6 million multiply-adds."""

    def __init__(self, num_classes: int = 10) -> None:
        """Build the network with freshly initialised weights.

        Args:
            num_classes: width of the last layer.
        """
        super().__init__()
        blocks: list[nn.Module] = [ConvNormActivation(1, STEM_CHANNELS, 3)]
        channels = STEM_CHANNELS
        for expansion, outputs, repeats, first_stride in STAGES:
            for index in range(repeats):
                stride = first_stride if index == 0 else 1
                blocks.append(InvertedResidual(channels, outputs, stride, expansion))
                channels = outputs
        blocks.append(ConvNormActivation(channels, HEAD_CHANNELS, 1))
        self.features = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(HEAD_CHANNELS, num_classes)
        self.apply(_initialise)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float32 (N, 1, 28, 28) to logits, float32 (N, num_classes)."""
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


def _initialise(module: nn.Module) -> None:
    """Give convolutions He's initialisation and the linear layer a small normal one."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.01)
        nn.init.zeros_(module.bias)
