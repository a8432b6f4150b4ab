"""Fake quantization with a learned step size.

Esser et al. 2020, "Learned step size quantization" (arXiv:1902.08153). With v the values and s the step,

    forward    q = s * rint(clip(v / s, low, high))                                          (eqs. 1 and 2)
    to v       1 where v / s lies within (low, high), else 0                                 (eq. 5)
    to s       rint(v / s) - v / s within, low below, high above                             (eq. 3)

so that a step also feels which side of a value's nearest integer it lies on. The paper divides the step's gradient by
sqrt(N * high), which balances steps and weights under plain SGD (section 2.2). Here Adam divides every gradient by its
own size, and nothing would change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["fake_quantize", "rounded_through"]


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        # Rounding a clipped ratio is clipping a rounded one, as the bounds are integers. In place, pass by pass.
        quantized = (values / step).clamp_(low, high).round_().mul_(step)
        ctx.save_for_backward(values, quantized, step)
        ctx.bounds = low, high
        return quantized

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (gradient,), (values, quantized, step), (low, high) = gradients, ctx.saved_tensors, ctx.bounds
        # One pass over the values where a mask would take several.
        inside = (values, low * float(step), high * float(step)) if step.numel() == 1 else (values / step, low, high)
        to_values = torch.ops.aten.hardtanh_backward(gradient, *inside)
        to_step = None
        if ctx.needs_input_grad[1]:
            # Equation 3 times s: what was rounded, minus the value itself where it was not clipped.
            if step.numel() == 1:
                total = _dot(gradient, quantized) - _dot(to_values, values)
            else:
                total = (gradient * quantized - to_values * values).sum_to_size(step.shape)
            to_step = (total / step).reshape(step.shape)
        return to_values if ctx.needs_input_grad[0] else None, to_step, None, None


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Sum of the products; without a copy where both lie in memory alike."""
    if one.dim() == 4 and one.is_contiguous(memory_format=torch.channels_last):
        one, other = one.permute(0, 2, 3, 1), other.permute(0, 2, 3, 1)
    return torch.dot(one.reshape(-1), other.reshape(-1))


def fake_quantize(values: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Quantize and dequantize.

    Args:
        values: float32, any shape.
        step: float32, positive, of a shape that broadcasts to that of the values.
        low: Least integer, counted from the zero point.
        high: Largest one.

    Returns:
        float32 of the values' shape, with the gradients of the paper.
    """
    return _FakeQuantize.apply(values, step, low, high)  # type: ignore[no-untyped-call]


def rounded_through(values: Tensor, step: Tensor) -> Tensor:
    """Values rounded to whole steps, with the gradient of the values themselves (Bengio et al. 2013, arXiv:1308.3432)."""
    return values + ((values / step).round() * step - values).detach()
