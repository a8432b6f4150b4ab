"""Translate layers: where their sums become integers, see `translate`."""

from __future__ import annotations

from typing import Any

import numpy as np

from qsearch.export.interchange.writer import Writer, scalar
from qsearch.qtype import PRECISIONS
from qsearch.quantize.program import INTEGER_DTYPES, Op

__all__ = ["translate_layer"]


def translate_layer(writer: Writer, op: Op) -> None:
    """Translate a conv2d, linear layers included."""
    conv, shapes = op.key.conv, op.key.shapes
    # A linear layer is a convolution of one pixel here.
    linear = all(shape[1:3] == (1, 1) for shape in (shapes[0], shapes[-1])) and conv.kernel == (1, 1) and conv.groups == 1
    seen = [(shape[0], shape[3]) if linear else shape for shape in shapes]
    everywhere = writer.rounding in ("steps", "sums")
    in_steps = op.key.dtypes[0] == "uint8" and (everywhere or (writer.rounding == "fused" and op.key.residual))
    x = writer.real(op.inputs[0], seen[0], 1.0 if in_steps else None)
    weight, bias = _layer_constants(writer, op, linear, in_steps)
    if linear:
        real = writer.step("Gemm", x, weight, bias, transB=1)
    else:
        attributes: dict[str, Any] = {"kernel_shape": conv.kernel, "strides": conv.stride, "pads": conv.padding}
        attributes["dilations"] = conv.dilation
        real = writer.step("Conv", x, weight, bias, group=conv.groups, **attributes)
    if in_steps and not _fuses(writer, op):
        real = writer.step("Mul", real, writer.constant("multiplier", _per_channel(op.constants["multiplier"], linear)))
    if op.key.residual:
        residual = _residual_steps(writer, op, seen[1]) if in_steps else writer.real(op.inputs[1], seen[1])
        real = writer.step("Add", real, residual)
    if op.key.clips_channels:
        high = op.constants["clip_high"]
        if op.output.dtype in INTEGER_DTYPES and not in_steps:
            high = high * writer.affine(op.output.name).scale
        real = writer.step("Min", real, writer.constant("high", _per_channel(high, linear)))
    writer.write(op, real, seen[-1], steps=in_steps)


def _fuses(writer: Writer, op: Op) -> bool:
    """A runtime can make one integer kernel of the layer and the conversions around it."""
    return writer.rounding != "sums" and not op.key.residual and (op.key.dtypes[0], op.output.dtype) == ("uint8", "uint8")


def _residual_steps(writer: Writer, op: Op, shape: tuple[int, ...]) -> str:
    """A residual in steps of the output, rounded as the program rounds it."""
    factor = np.float32(scalar(op, "b_multiplier"))
    if op.key.dtypes[1] in INTEGER_DTYPES:
        return writer.real(op.inputs[1], shape, float(factor))
    residual = writer.real(op.inputs[1], shape)
    return residual if factor == 1 else writer.step("Mul", residual, writer.constant("residual", np.array(factor)))


def _layer_constants(writer: Writer, op: Op, linear: bool, in_steps: bool) -> tuple[str, str]:
    """Weight (O, I/groups, kh, kw) or (O, I) and bias (O,), as real numbers or as the integers that they are."""
    weight = op.constants["weight"].transpose(0, 3, 1, 2)
    weight = weight.reshape(weight.shape[:2]) if linear else weight
    bias = op.constants["bias"]
    if not PRECISIONS[op.key.precision or ""].is_integer:
        return writer.constant("weight", weight.astype(np.float32)), writer.constant("bias", bias.astype(np.float32))
    affine, scale = writer.affine(op.inputs[0]), op.constants["weight_scale"]
    # The program has folded the input's zero point into the bias.
    whole = bias.astype(np.int64) + affine.zero_point * weight.reshape(len(weight), -1).sum(1, dtype=np.int64)
    fused = _fuses(writer, op)
    if in_steps:
        scale = op.constants["multiplier"] if fused else np.ones_like(scale)
    elif fused and writer.rounding == "fused":
        scale = _fused_scale(op, scale, affine.scale, writer.affine(op.output.name).scale)
    scale = scale[0] if (scale == scale[0]).all() else scale
    bias_scale = scale if in_steps else scale * affine.scale
    names = []
    for name, integers, step in (("weight", weight, scale), ("bias", whole.astype(np.int32), bias_scale)):
        given = writer.constant(name, integers), writer.constant(f"{name}.scale", np.asarray(step, np.float32))
        names.append(writer.step("Weight", *given))
    return names[0], names[1]


def _fused_scale(op: Op, scale: np.ndarray, given: np.float32, unit: np.float32) -> np.ndarray:
    """Weight scales with which a fused kernel's multiplier, scale * given / unit in float32, is the program's own.

    They differ from the weights' scales in their last bits, if at all.
    """
    found = scale.copy()
    for step in (4, -4, 3, -3, 2, -2, 1, -1, 0):
        near = (scale.view(np.int32) + np.int32(step)).view(np.float32)
        found = np.where(near * given / unit == op.constants["multiplier"], near, found)
    return found


def _per_channel(values: np.ndarray, linear: bool) -> np.ndarray:
    return values.astype(np.float32).reshape((1, -1) if linear else (1, -1, 1, 1))
