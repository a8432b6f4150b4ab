"""Moments of layers' inputs: against unfolding everything, and what cannot be observed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qsearch.calibrate import input_moments as moments_module
from qsearch.calibrate.input_moments import KeptMoments, input_moments
from qsearch.errors import CalibrationError, DataError
from qsearch.models.graph import Conv, Graph, Model, Node, Parameters


def one_layer(conv: Conv, channels: int, outputs: int, size: tuple[int, int]) -> Model:
    top, left, bottom, right = conv.padding
    height = (size[0] + top + bottom - conv.dilation[0] * (conv.kernel[0] - 1) - 1) // conv.stride[0] + 1
    width = (size[1] + left + right - conv.dilation[1] * (conv.kernel[1] - 1) - 1) // conv.stride[1] + 1
    nodes = (
        Node("input", "input", (), (1, channels, *size)),
        Node("conv", "conv2d", ("input",), (1, outputs, height, width), conv),
    )
    weight = np.random.default_rng(0).normal(size=(outputs, channels // conv.groups, *conv.kernel)).astype(np.float32)
    return Model("one", Graph(nodes, "conv"), Parameters({"conv": weight}, {"conv": np.zeros(outputs, np.float32)}))


def two_layers(size: tuple[int, int]) -> Model:
    nodes = (
        Node("input", "input", (), (1, 3, *size)),
        Node("first", "conv2d", ("input",), (1, 5, *size), Conv()),
        Node("second", "conv2d", ("first",), (1, 2, *size), Conv()),
    )
    draw = np.random.default_rng(2)
    weights = {"first": draw.normal(size=(5, 3, 1, 1)), "second": draw.normal(size=(2, 5, 1, 1))}
    weights = {name: weight.astype(np.float32) for name, weight in weights.items()}
    biases = {"first": np.zeros(5, np.float32), "second": np.zeros(2, np.float32)}
    return Model("two", Graph(nodes, "second"), Parameters(weights, biases))


def images(count: int, channels: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(1).normal(1.0, 2.0, (count, channels, *size)).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    shape=st.sampled_from([(1, 3, 4), (2, 4, 2), (4, 4, 4), (3, 6, 3)]),
)
def test_moments_are_those_of_all_positions_where_all_are_drawn(kernel, stride, padding, dilation, shape) -> None:
    groups, channels, outputs = shape
    size = (6, 5)
    conv = Conv(kernel, stride, padding, dilation, groups)
    model, data = one_layer(conv, channels, outputs, size), images(7, channels, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments_module, "LEAST_DRAWS", 1000)
        found = input_moments(model, data)["conv"]
    top, left, bottom, right = padding
    padded = F.pad(torch.tensor(data), (left, right, top, bottom))
    rows = F.unfold(padded, kernel, dilation, 0, stride).double()
    rows = rows.reshape(7, groups, -1, rows.shape[-1]).permute(1, 0, 3, 2).reshape(groups, -1, rows.shape[1] // groups)
    np.testing.assert_allclose(found.mean, rows.mean(1).numpy(), atol=1e-5)
    centred = rows - rows.mean(1, keepdim=True)
    np.testing.assert_allclose(found.covariance, (centred.transpose(1, 2) @ centred / rows.shape[1]).numpy(), atol=1e-4)
    assert found.count == rows.shape[1]


def test_draws_are_few_and_estimate_the_whole() -> None:
    model, data = one_layer(Conv(), 4, 4, (40, 40)), images(30, 4, (40, 40))
    found = input_moments(model, data)["conv"]
    assert found.count == 30 * moments_module.LEAST_DRAWS < 30 * 1600
    np.testing.assert_allclose(found.mean, 1.0, atol=0.4)
    np.testing.assert_allclose(found.covariance[0], 4 * np.eye(4), atol=1.2)


def test_moments_of_the_model_asked_about_last_are_kept_while_they_are_small() -> None:
    model, other = two_layers((6, 6)), two_layers((6, 6))
    data, asked = images(4, 3, (6, 6)), []

    def given() -> np.ndarray:
        asked.append(len(data))
        return data

    kept, fresh = KeptMoments(given), input_moments(model, data)
    assert list(kept.of(model, ["second"])) == ["second"] and len(asked) == 1
    both = kept.of(model, ["first", "second"])
    assert list(both) == ["first", "second"] and len(asked) == 2
    for name, found in both.items():
        np.testing.assert_array_equal(found.covariance, fresh[name].covariance)
        np.testing.assert_array_equal(found.mean, fresh[name].mean)
    assert kept.of(model, ["first"])["first"] is both["first"] and len(asked) == 2
    kept.of(other, ["first"])
    assert len(asked) == 3
    kept.of(model, ["first"])
    assert len(asked) == 4
    small = KeptMoments(given, sum(one.mean.nbytes + one.covariance.nbytes for one in fresh.values()) - 1)
    assert all(len(small.of(model, ["first", "second"])) == 2 for _ in range(2)) and len(asked) == 6


def test_a_layer_is_observed_alike_alone_and_beside_others() -> None:
    model, data = two_layers((20, 20)), images(6, 3, (20, 20))
    both, alone = input_moments(model, data), input_moments(model, data, ["second"])
    assert list(both) == ["first", "second"] and list(alone) == ["second"]
    np.testing.assert_array_equal(both["second"].covariance, alone["second"].covariance)
    assert not np.array_equal(both["second"].covariance, input_moments(model, data, seed=1)["second"].covariance)


def test_what_cannot_be_observed_is_named() -> None:
    model, data = one_layer(Conv(), 3, 2, (4, 4)), images(3, 3, (4, 4))
    with pytest.raises(DataError, match="at least one calibration image"):
        input_moments(model, data[:0])
    data[1, 0, 2, 2] = np.inf
    with pytest.raises(CalibrationError, match="layer 'conv' reads NaN or infinity"):
        input_moments(model, data)
    wide = one_layer(Conv((3, 3)), 1000, 1, (3, 3))
    with pytest.raises(CalibrationError, match="reads 9000 values at once.*nearest"):
        input_moments(wide, images(1, 1000, (3, 3)))
