"""A program as float operators with quantization around them: what ONNX and torch both can say.

Image values are held as (N, C, H, W) here. Operators and their attributes are those of ONNX where they have a name
there; the rest are:

    Quantize     float -> integers; attributes `affine`, `qmin`, `qmax`, the bounds of a fused clip included
    Dequantize   integers -> float; attribute `affine`; of both `stored` is the value's own scale, which `affine` need not have
    Weight       integers of a layer -> float; second input: scales, float32 (O,) or (), along axis 0
    Half         float -> the nearest float16 -> float
    Lookup       integers -> integers by a table of 256; attributes `affine` of what it reads, `written` of what it writes
    Foreign      an ATen call; attribute `foreign`, inputs as there, then its parameters by name
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qsearch.export.runner import batches_of

__all__ = ["QuantizedNetwork", "Step", "in_batches"]


@dataclass(frozen=True)
class Step:
    """One operator.

    Attributes:
        op: Its name, see above.
        inputs: Names of tensors or constants.
        output: The tensor it writes.
        layer: The operation of the program that it belongs to, for messages.
        attributes: By name.
    """

    op: str
    inputs: tuple[str, ...]
    output: str
    layer: str
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class QuantizedNetwork:
    """A program, translated.

    Attributes:
        input: Name of its input.
        shape: Of its input, (N, C, H, W).
        output: Name of its output, float32.
        output_shape: Its shape.
        steps: In order.
        constants: Name -> array.
    """

    input: str
    shape: tuple[int, ...]
    output: str
    output_shape: tuple[int, ...]
    steps: tuple[Step, ...]
    constants: dict[str, np.ndarray]


def in_batches(run: Callable[[np.ndarray], np.ndarray], images: np.ndarray, batch: int) -> np.ndarray:
    """What a network of one size of batch gives for any number of images; a last batch that is short is filled up, and cut.

    Args:
        run: float32 (batch, C, H, W) -> (batch, ...).
        images: float32 (N, C, H, W).
        batch: Images at a time.
    """
    return np.concatenate([run(np.array(one)) for one in batches_of(images, batch)])[: len(images)]
