"""Second-order rounding: never worse than nearest, exact where that is possible, and what degenerate layers give."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qsearch.calibrate.input_moments import InputMoments
from qsearch.errors import QuantizeError
from qsearch.qtype import INT8, INT16, IntRange
from qsearch.quantize.rounding.columns import columns_of, compensated, descended
from qsearch.quantize.rounding.second_order import output_errors, round_second_order
from qsearch.quantize.weights import quantize_weight, weight_scales

FOUR = IntRange("int8", -8, 7)


def moments(groups: int, reads: int, seed: int = 0, rank: int | None = None) -> InputMoments:
    """Correlated inputs."""
    draw = np.random.default_rng(seed)
    rows = draw.normal(size=(groups, 4 * reads if rank is None else rank, reads)) @ draw.normal(size=(groups, reads, reads))
    covariance = rows.transpose(0, 2, 1) @ rows / rows.shape[1]
    return InputMoments(draw.normal(size=(groups, reads)), covariance, 1 << 30)


def layer(groups: int, outputs: int, inputs: int, kernel: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + 1).normal(size=(groups * outputs, inputs, *kernel)).astype(np.float32)


def damped_errors(weight, quantized, found, limits):
    """The error that is minimised, per row."""
    columns = columns_of("layer", torch.tensor(weight), found, limits)
    integers = torch.tensor(quantized.values.transpose(0, 3, 1, 2).astype(np.float32)).reshape(columns.rows.shape)
    integers = integers.gather(2, columns.order[:, None].expand_as(integers))
    return columns.errors(integers, torch.tensor(quantized.scale).reshape(*columns.rows.shape[:2], 1)).reshape(-1).numpy()


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(1, 5, 7, (1, 1)), (6, 1, 1, (3, 3)), (3, 2, 4, (2, 3)), (1, 3, 70, (1, 1)), (2, 1, 5, (1, 2))]),
    seed=st.integers(0, 1000),
    limits=st.sampled_from([FOUR, IntRange("int8", -7, 7), IntRange("int8", -2, 1), INT8.weight]),
    granularity=st.sampled_from(["channel_wise", "layer_wise"]),
    rule=st.sampled_from(["max", "power_of_two"]),
)
@example((1, 5, 7, (1, 1)), 0, INT8.weight, "channel_wise", "max")
def test_error_is_never_above_nearest_with_the_same_scales(shape, seed, limits, granularity, rule) -> None:
    weight, found = layer(*shape, seed), moments(shape[0], shape[2] * shape[3][0] * shape[3][1], seed)
    rounded = round_second_order("layer", weight, found, limits, granularity, rule)
    assert rounded.values.dtype == limits.dtype and rounded.scale.dtype == np.float32
    assert rounded.values.shape == (len(weight), *weight.shape[2:], weight.shape[1])
    assert rounded.values.min() >= limits.qmin and rounded.values.max() <= limits.qmax
    assert granularity == "channel_wise" or len(set(rounded.scale.tolist())) == 1
    assert rule == "max" or np.array_equal(np.log2(rounded.scale), np.rint(np.log2(rounded.scale)))
    own = damped_errors(weight, rounded, found, limits)
    for scale in (rounded.scale, weight_scales(weight, limits, granularity, rule)):
        nearest = damped_errors(weight, quantize_weight(weight, scale, limits), found, limits)
        if scale is rounded.scale and (granularity == "channel_wise" or rule == "power_of_two"):
            assert (own <= nearest * 1.001 + 1e-6).all()
        assert own.sum() <= nearest.sum() * 1.001 + 1e-6


def test_uncorrelated_inputs_are_rounded_to_nearest() -> None:
    weight = layer(1, 4, 12, (1, 1))
    variance = np.random.default_rng(3).uniform(0.1, 5.0, (1, 12))
    found = InputMoments(np.zeros((1, 12)), np.stack([np.diag(row) for row in variance]), 1000)
    rounded = round_second_order("layer", weight, found, FOUR)
    np.testing.assert_array_equal(rounded.values, quantize_weight(weight, rounded.scale, FOUR).values)


@pytest.mark.parametrize("seed", range(6))
def test_descent_ends_where_no_single_integer_can_be_better_and_near_the_optimum(seed: int) -> None:
    limits, found = IntRange("int8", -2, 1), moments(1, 5, seed)
    weight = layer(1, 3, 5, (1, 1), seed)
    columns = columns_of("layer", torch.tensor(weight), found, limits)
    scale = torch.full((1, 3, 1), 0.7)
    integers = descended(columns, compensated(columns, scale), scale, 50)
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=5)), dtype=torch.float32)
    for row in range(3):
        chunk = columns.chunk(row, row + 1).repeated(len(every))
        errors = chunk.errors(every[None], torch.full((1, len(every), 1), 0.7))[0]
        own = columns.errors(integers, scale)[0, row]
        neighbours = (every != integers[0, row]).sum(1) == 1
        assert own <= errors[neighbours].min() * 1.0001
        nearest = columns.errors(columns.nearest(scale), scale)[0, row]
        assert errors.min() * 0.9999 <= own <= nearest * 1.0001


def test_correlated_inputs_gain_much_and_scales_follow_the_error() -> None:
    weight, found = layer(1, 16, 64, (1, 1)), moments(1, 64)
    nearest = quantize_weight(weight, weight_scales(weight, FOUR, "channel_wise", "max"), FOUR)
    rounded = round_second_order("layer", weight, found, FOUR)
    assert output_errors(weight, rounded, found).sum() < 0.5 * output_errors(weight, nearest, found).sum()


def test_output_errors_are_the_variance_of_what_changes() -> None:
    weight, draw = layer(2, 3, 4, (1, 2)), np.random.default_rng(5)
    rows = draw.normal(size=(2, 50, 8))
    mean = rows.mean(1)
    found = InputMoments(mean, np.stack([np.cov(one.T, bias=True) for one in rows]), 50)
    rounded = round_second_order("layer", weight, found, FOUR)
    real = rounded.values.transpose(0, 3, 1, 2) * rounded.scale[:, None, None, None]
    change = np.einsum("gsk,gok->gso", rows, (real - weight).reshape(2, 3, 8).astype(np.float64))
    np.testing.assert_allclose(output_errors(weight, rounded, found), change.var(1).reshape(-1), rtol=1e-6)


def test_dead_channels_constant_inputs_and_few_images() -> None:
    weight = layer(1, 4, 6, (1, 1))
    weight[1] = 0
    rounded = round_second_order("layer", weight, moments(1, 6, rank=2), FOUR)
    assert not rounded.values[1].any() and np.isfinite(rounded.scale).all() and (rounded.scale > 0).all()
    still = InputMoments(np.ones((1, 6)), np.zeros((1, 6, 6)), 9)
    constant = round_second_order("layer", weight, still, FOUR)
    np.testing.assert_array_equal(constant.values, quantize_weight(weight, constant.scale, FOUR).values)


@pytest.mark.parametrize("seed", range(3))
def test_a_covariance_that_is_nothing_but_rounding_errors_is_made_usable(seed: int) -> None:
    noise = np.random.default_rng(seed).normal(size=(1, 24, 24)) * 1e-6
    found = InputMoments(np.full((1, 24), 3.0), noise + noise.transpose(0, 2, 1), 1)
    rounded = round_second_order("layer", layer(1, 6, 24, (1, 1)), found, FOUR)
    assert rounded.values.any((1, 2, 3)).all() and np.isfinite(rounded.scale).all()
    columns = columns_of("layer", torch.tensor(layer(1, 6, 24, (1, 1))), found, FOUR)
    assert torch.linalg.eigvalsh(columns.covariance.double()).min() > 0


def test_sixteen_bits_and_many_channels_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, found = layer(1, 9, 20, (1, 1)), moments(1, 20)
    whole = round_second_order("layer", weight, found, INT16.weight)
    assert whole.values.dtype == np.int16
    monkeypatch.setattr("qsearch.quantize.rounding.second_order.CHUNK", 200)
    parts = round_second_order("layer", weight, found, FOUR)
    monkeypatch.undo()
    np.testing.assert_array_equal(parts.values, round_second_order("layer", weight, found, FOUR).values)


def test_what_is_not_finite_or_belongs_elsewhere_is_refused() -> None:
    weight = layer(1, 4, 6, (1, 1))
    with pytest.raises(QuantizeError, match="moments of 1 groups of 5 inputs"):
        round_second_order("layer", weight, moments(1, 5), FOUR)
    weight[2, 1] = np.nan
    with pytest.raises(QuantizeError, match="'layer' has NaN or infinity"):
        round_second_order("layer", weight, moments(1, 6), FOUR)
