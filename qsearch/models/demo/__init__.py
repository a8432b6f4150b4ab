"""The built-in model and images: a small MobileNetV2-style network for Fashion-MNIST."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

from qsearch.data.preprocessing import Preprocessing
from qsearch.models.demo.images import read_images_and_labels
from qsearch.models.demo.network import DemoNet

__all__ = ["CLASSES", "PREPROCESSING", "DemoNet", "build", "load_images"]

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
PREPROCESSING = Preprocessing(resize=None, crop=(28, 28), mean=(0.2860,), std=(0.3530,), channels=1)

_DATA = Path(__file__).parent / "data"


def build() -> nn.Module:
    """Return the trained network in evaluation mode: float32 (N, 1, 28, 28) to logits, float32 (N, 10)."""
    network = DemoNet(len(CLASSES))
    network.load_state_dict(load_file(_DATA / "weights.safetensors"))
    return network.eval()


def load_images() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the test images, which the network was not trained on.

    Returns:
        Images, uint8 (10000, 28, 28), and labels, int64 (10000,).
    """
    return read_images_and_labels(_DATA, "t10k")
