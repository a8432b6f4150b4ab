"""The built-in detector and its scenes: garments to be found, boxed and named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from torch import nn

from qsearch.data.preprocessing import Preprocessing
from qsearch.models.demo import CLASSES, load_images
from qsearch.models.demo_detector.network import STRIDE, DemoDetector
from qsearch.models.demo_detector.scenes import SIDE, Scene, compose_all

__all__ = ["CLASSES", "DETECTION", "PREPROCESSING", "SCENES", "DemoDetector", "build", "load_scenes"]

PREPROCESSING = Preprocessing(resize=None, crop=(SIDE, SIDE), mean=(0.2,), std=(0.3,), channels=1)
DETECTION = {"strides": [STRIDE], "heads": ["box_head", "class_head"]}

SCENES = {"calibration": 128, "search": 500, "heldout": 500}
"""How many scenes each part has."""

_WEIGHTS = Path(__file__).parent / "data" / "weights.safetensors"
_SEED = 0


def build() -> nn.Module:
    """Return the trained network in evaluation mode: float32 (N, 1, 80, 80) to float32 (N, 100, 14)."""
    network = DemoDetector(len(CLASSES))
    network.load_state_dict(load_file(_WEIGHTS))
    return network.eval()


def load_scenes() -> dict[str, tuple[Scene, ...]]:
    """Compose the scenes of each part, always the same.

    Their garments are images that neither built-in network was trained on, and no garment is in two parts.
    """
    garments, labels = load_images()
    random = np.random.default_rng(_SEED)
    shares = np.cumsum([count / sum(SCENES.values()) for count in SCENES.values()])[:-1]
    pools = np.split(random.permutation(len(garments)), (shares * len(garments)).astype(int))
    return {
        part: compose_all(garments[pool], labels[pool], count, random)
        for (part, count), pool in zip(SCENES.items(), pools, strict=True)
    }
