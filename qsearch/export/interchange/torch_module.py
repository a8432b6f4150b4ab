"""A translated program as a torch module with fake quantization, and as an archive of `torch.export`.

Values are rounded to their integers and stay real numbers (Jacob et al. 2018, section 3); weights are held as the
integers they are. Only operators of torch's own core are called, so that an archive loads without qsearch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsearch.errors import BundleError
from qsearch.export.interchange.steps import QuantizedNetwork, Step, in_batches
from qsearch.models.interpret import call_foreign
from qsearch.quantize.affine import Affine

__all__ = ["FakeQuantized", "run_archive", "save_archive"]


class FakeQuantized(nn.Module):
    """The fake-quantized network.

    Args:
        network: What it computes; its constants become buffers.
    """

    def __init__(self, network: QuantizedNetwork) -> None:
        super().__init__()
        self.network = network
        self.buffer_names: dict[str, str] = {}
        for i, (name, array) in enumerate(network.constants.items()):
            self.buffer_names[name] = f"{re.sub(r'[^A-Za-z0-9]+', '_', name)}_{i}"
            self.register_buffer(self.buffer_names[name], torch.from_numpy(array.copy()))

    def forward(self, image: Tensor) -> Tensor:
        """float32 (N, C, H, W) -> the output, float32; N as the program has it."""
        values: dict[str, Tensor] = {name: getattr(self, buffer) for name, buffer in self.buffer_names.items()}
        values[self.network.input] = image
        for step in self.network.steps:
            values[step.output] = _STEPS[step.op](step, *(values[name] for name in step.inputs))
        return values[self.network.output]


def _quantize(step: Step, x: Tensor) -> Tensor:
    affine, qmin, qmax = cast(Affine, step.attributes["affine"]), step.attributes["qmin"], step.attributes["qmax"]
    scale, zero_point = float(affine.scale), affine.zero_point
    # Values are held in their own scale, whatever the layer counts in.
    held = float(step.attributes["stored"].scale / affine.scale)
    if qmin <= zero_point <= qmax:
        rounded = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, qmin, qmax)
        return rounded if held == 1 else rounded * held
    # torch wants zero among the integers; the clip that excludes it comes after.
    rounded = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, affine.limits.qmin, affine.limits.qmax)
    rounded = rounded.clamp((qmin - zero_point) * scale, (qmax - zero_point) * scale)
    return rounded if held == 1 else rounded * held


def _dequantize(step: Step, x: Tensor) -> Tensor:
    affine, stored = cast(Affine, step.attributes["affine"]), cast(Affine, step.attributes["stored"])
    return x if affine == stored else torch.round(x / float(stored.scale)) * float(affine.scale)


def _weight(step: Step, integers: Tensor, scale: Tensor) -> Tensor:
    return integers.float() * (scale.reshape(-1, *[1] * (integers.dim() - 1)) if scale.dim() else scale)


def _lookup(step: Step, x: Tensor, table: Tensor) -> Tensor:
    given, written = cast(Affine, step.attributes["affine"]), cast(Affine, step.attributes["written"])
    index = torch.round(x / float(given.scale)) + given.zero_point
    return ((table.float() - written.zero_point) * float(written.scale))[index.long()]


def _padded(x: Tensor, pads: tuple[int, ...], fill: float = 0.0) -> Tensor:
    top, left, bottom, right = pads
    return F.pad(x, (left, right, top, bottom), value=fill) if any(pads) else x


def _conv(step: Step, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    given = step.attributes
    x = _padded(x, given["pads"])
    return F.conv2d(x, weight, bias, given["strides"], 0, given["dilations"], given["group"])


def _max_pool(step: Step, x: Tensor) -> Tensor:
    given = step.attributes
    return F.max_pool2d(_padded(x, given["pads"], -torch.inf), given["kernel_shape"], given["strides"])


def _average_pool(step: Step, x: Tensor) -> Tensor:
    pads, window = step.attributes["pads"], (step.attributes["kernel_shape"], step.attributes["strides"])
    mean = F.avg_pool2d(_padded(x, pads), *window)
    if step.attributes["count_include_pad"] or not any(pads):
        return mean
    return mean / F.avg_pool2d(_padded(torch.ones_like(x), pads), *window)


def _layer_norm(step: Step, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, step.attributes["epsilon"])


def _slice(step: Step, x: Tensor) -> Tensor:
    for axis, (start, end) in enumerate(zip(step.attributes["starts"], step.attributes["ends"], strict=True)):
        x = x.narrow(axis, start, end - start)
    return x


def _foreign(step: Step, *tensors: Tensor) -> Tensor:
    foreign = step.attributes["foreign"]
    count = len(tensors) - len(foreign.parameters)
    # Views need the order of their logical shape.
    operands = [tensor.contiguous() for tensor in tensors[:count]]
    return call_foreign(foreign, operands, dict(zip(foreign.parameters, tensors[count:], strict=True)))


_STEPS: dict[str, Callable[..., Tensor]] = {
    "Quantize": _quantize,
    "Dequantize": _dequantize,
    "Weight": _weight,
    "Half": lambda step, x: x.half().float(),
    "Lookup": _lookup,
    "Foreign": _foreign,
    "Conv": _conv,
    "Gemm": lambda step, x, weight, bias: F.linear(x, weight, bias),
    "MatMul": lambda step, a, b: a @ b,
    "Add": lambda step, a, b: a + b,
    "Mul": lambda step, a, b: a * b,
    "Div": lambda step, a, b: a / b,
    "Min": lambda step, a, b: torch.minimum(a, b),
    "Max": lambda step, a, b: torch.maximum(a, b),
    "Clip": lambda step, x: x.clamp(step.attributes["low"], step.attributes["high"]),
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda step, x: x.mean((2, 3), keepdim=True),
    "Concat": lambda step, *parts: torch.cat(parts, step.attributes["axis"]),
    "Gather": lambda step, x, index: x.index_select(step.attributes["axis"], index),
    "Reshape": lambda step, x: x.reshape(step.attributes["shape"]),
    "Transpose": lambda step, x: x.permute(step.attributes["perm"]),
    "Slice": _slice,
    "Identity": lambda step, x: x.clone(),
    "Sigmoid": lambda step, x: torch.sigmoid(x),
    "Tanh": lambda step, x: torch.tanh(x),
    "Gelu": lambda step, x: F.gelu(x),
    "HardSwish": lambda step, x: F.hardswish(x),
    "HardSigmoid": lambda step, x: F.hardsigmoid(x),
    "Softmax": lambda step, x: torch.softmax(x, -1),
    "RowLength": lambda step, x: torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    "LayerNormalization": _layer_norm,
}


def save_archive(network: QuantizedNetwork, path: Path, extra_files: dict[str, Any]) -> None:
    """Export the fake-quantized network and save it.

    Args:
        network: The network.
        path: Where to.
        extra_files: Name within the archive -> text.

    Raises:
        BundleError: torch cannot export it.
    """
    module = FakeQuantized(network).eval()
    try:
        with torch.no_grad():
            program = torch.export.export(module, (torch.zeros(network.shape),))
        torch.export.save(program, path, extra_files=extra_files)
    except OSError:
        raise
    except Exception as error:  # torch documents no exceptions here, and raises a dozen
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise BundleError(
            f"torch {torch.__version__} cannot export the network: {reason}; try --format onnx or a bundle"
        ) from error


def run_archive(path: Path, images: np.ndarray) -> np.ndarray:
    """What a saved archive gives for images, as many at a time as it takes.

    Args:
        path: Of `save_archive`.
        images: float32 (N, C, H, W).
    """
    program = torch.export.load(path)
    module, (given,) = program.module(), program.example_inputs[0]
    with torch.no_grad():
        return in_batches(lambda batch: module(torch.from_numpy(batch)).numpy(), images, given.shape[0])
