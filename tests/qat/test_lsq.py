"""Fake quantization: its values, and the gradients that the paper gives it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qsearch.qat.lsq import fake_quantize, rounded_through


def formula(values: np.ndarray, step: np.ndarray, low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Equations 1, 2, 5 and 3 of the paper: the values, and per value the gradients to itself and to the step."""
    ratio = values / step
    inside = (ratio > low) & (ratio < high)
    to_step = np.where(inside, np.rint(ratio) - ratio, np.where(ratio <= low, low, high))
    return np.rint(np.clip(ratio, low, high)) * step, inside.astype(np.float64), to_step


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (6, 1, 1, 1), ()])
@pytest.mark.parametrize("bounds", [(-8, 7), (0, 255), (-100, 155), (-127, 127)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_the_papers(shape, bounds, layout):
    generator = torch.Generator().manual_seed(1)
    span = max(-bounds[0], bounds[1])
    values = torch.randn(6, 5, 4, 3, generator=generator).to(memory_format=layout).mul(0.6).requires_grad_()
    step = (1 + 0.2 * torch.rand(shape, generator=generator)).div(span).requires_grad_()
    weights = torch.randn(6, 5, 4, 3, generator=generator)
    result = fake_quantize(values, step, *bounds)
    (result * weights).sum().backward()
    expected, to_values, to_step = formula(values.detach().double().numpy(), step.detach().double().numpy(), *bounds)
    np.testing.assert_allclose(result.detach(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values.grad, weights * to_values, rtol=1e-6)
    per_value = torch.from_numpy(to_step * weights.double().numpy())
    np.testing.assert_allclose(step.grad, per_value.sum_to_size(shape), rtol=2e-3, atol=2e-3)


def test_where_everything_is_clipped_the_step_has_the_gradient_of_finite_differences():
    values = torch.tensor([-3.0, -2.0, 5.0, 9.0], dtype=torch.float64)
    step = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)

    def loss(at: torch.Tensor) -> torch.Tensor:
        return (fake_quantize(values, at, -8, 7) * weights).square().sum()

    loss(step).backward()
    with torch.no_grad():
        difference = (loss(step + 1e-6) - loss(step - 1e-6)) / 2e-6
    assert step.grad.item() == pytest.approx(float(difference), rel=1e-6)


def test_a_step_moves_to_where_the_error_is_smaller():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    step = torch.tensor(1.5, requires_grad=True)
    optimizer = torch.optim.Adam([step], lr=0.03)
    errors = []
    for _ in range(60):
        error = (fake_quantize(values, step, -8, 7) - values).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    # The least squared error of 16 levels of a normal variable is at a step of a third of its deviation.
    assert errors[-1] < 0.1 * errors[0] and 0.25 < step.item() < 0.5


def test_a_bias_is_rounded_and_keeps_its_gradient():
    bias, step = torch.tensor([0.26, -1.3], requires_grad=True), torch.tensor([0.1, 0.5])
    rounded = rounded_through(bias, step)
    rounded.sum().backward()
    torch.testing.assert_close(rounded.detach(), torch.tensor([0.3, -1.5]))
    torch.testing.assert_close(bias.grad, torch.ones(2))
