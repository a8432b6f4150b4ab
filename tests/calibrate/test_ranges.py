"""Every calibration mode: its own promise, and what holds whatever the mode."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qsearch.calibrate.histogram import TensorStatistics, channel_extremes
from qsearch.calibrate.kl_divergence import kl_divergence_range
from qsearch.calibrate.mse import mse_range, quantization_error
from qsearch.calibrate.observe import observe
from qsearch.calibrate.percentile import percentile_range
from qsearch.calibrate.ranges import activation_ranges
from qsearch.calibrate.record import StatisticsRecord
from qsearch.config import Calibration, CalibrationMode
from qsearch.errors import CalibrationError
from qsearch.models.graph import Conv, ForeignOp, Graph, Model, Node, Parameters, Pool

MODES = get_args(CalibrationMode)
VALUES = arrays(np.float32, st.integers(1, 300), elements=st.floats(-100, 100, width=32, allow_subnormal=False))


def statistics_of(values: np.ndarray) -> TensorStatistics:
    tensor = torch.from_numpy(np.asarray(values, np.float32))
    low, high = channel_extremes(tensor)
    return TensorStatistics.empty(len(low)).extended(tensor, low, high)


def gaussian(count: int = 100_000) -> np.ndarray:
    return np.random.default_rng(0).normal(size=count)


def error_of(values: np.ndarray, low: float, high: float) -> float:
    return float(quantization_error(values, np.ones(len(values)), np.array([low]), np.array([high]))[0])


@settings(max_examples=100, deadline=None)
@given(VALUES, st.floats(50.5, 100.0))
def test_percentile_is_numpys_quantile_within_one_bin(values: np.ndarray, percentile: float) -> None:
    statistics = statistics_of(values)
    low, high = percentile_range(statistics, percentile)
    width = statistics.histogram.width
    wanted = values.astype(np.float64)
    lower, upper = min(np.quantile(wanted, 1 - percentile / 100), 0), max(np.quantile(wanted, percentile / 100), 0)
    if max(-lower, upper) > 2 * width:  # else the full range stands in for one that is next to nothing
        assert low == pytest.approx(lower, abs=1.001 * width)
        assert high == pytest.approx(upper, abs=1.001 * width)
    assert min(values.min(), 0) <= low <= 0 <= high <= max(values.max(), 0)


def test_percentile_keeps_one_sided_tensors_one_sided() -> None:
    values = np.maximum(gaussian(), 0)
    low, high = percentile_range(statistics_of(values), 99.0)
    assert low == 0.0
    assert high == pytest.approx(np.quantile(values, 0.99), abs=1e-2)


def test_percentile_100_is_the_exact_range() -> None:
    values = gaussian(1000).astype(np.float32)
    assert percentile_range(statistics_of(values), 100.0) == (values.min(), values.max())


def test_percentile_does_not_cut_a_sparse_tensor_to_nothing() -> None:
    values = np.zeros(100_000)
    values[:5] = 3.0
    assert percentile_range(statistics_of(values), 99.9) == (0.0, 3.0)


@settings(max_examples=100, deadline=None)
@given(VALUES)
def test_mse_is_no_worse_than_max(values: np.ndarray) -> None:
    statistics = statistics_of(values)
    low, high = mse_range(statistics)
    full = min(values.min(), 0.0), max(values.max(), 0.0)
    assert full[0] <= low <= 0 <= high <= full[1]
    if full[1] > full[0]:
        wide = values.astype(np.float64)
        # The histogram knows a value to half a bin; errors may differ by that much twice.
        assert error_of(wide, low, high) ** 0.5 <= error_of(wide, *full) ** 0.5 + statistics.histogram.width


def test_mse_gains_where_there_are_outliers() -> None:
    values = np.append(gaussian(1_000_000), [25.0, -20.0])
    low, high = mse_range(statistics_of(values))
    assert error_of(values, low, high) < 0.7 * error_of(values, values.min(), values.max())


def test_kl_cuts_the_outliers_of_a_gaussian() -> None:
    low, high = kl_divergence_range(statistics_of(np.append(gaussian(1_000_000), [40.0, -35.0])))
    assert -7 < low < -3
    assert 3 < high < 7


def test_kl_cuts_one_side_alone() -> None:
    dense = np.random.default_rng(1).uniform(-10, 0, 200_000)
    low, high = kl_divergence_range(statistics_of(np.concatenate([dense, np.abs(gaussian(200_000)), [9.0]])))
    assert low < -9.5
    assert 3 < high < 7


def test_kl_after_relu_keeps_zero_and_is_not_drowned_by_zeros() -> None:
    values = np.append(np.maximum(gaussian(1_000_000) - 1, 0), 40.0)
    low, high = kl_divergence_range(statistics_of(values))
    assert low == 0.0
    assert 2.5 < high < 6
    assert kl_divergence_range(statistics_of(-values)) == pytest.approx((-high, 0.0), abs=0.1)


@pytest.mark.parametrize("values", [np.random.default_rng(0).uniform(-1, 1, 200_000), np.clip(3 * gaussian(), 0, 6)])
def test_kl_keeps_a_distribution_without_tails(values: np.ndarray) -> None:
    low, high = kl_divergence_range(statistics_of(values))
    assert (low, high) == pytest.approx((min(values.min(), 0), values.max()), rel=0.02)


@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_kl_stays_within_the_values(values: np.ndarray) -> None:
    low, high = kl_divergence_range(statistics_of(values))
    assert min(values.min(), 0) <= low <= 0 <= high <= max(values.max(), 0)


def network() -> Model:
    """Every kind of node; 'dead' is zero everywhere."""
    rng = np.random.default_rng(0)
    image, half = (1, 4, 8, 8), (1, 4, 4, 4)
    call = '{"args": [{"tensor": 0}], "kwargs": {}}'
    nodes = (
        Node("input", "input", (), (1, 3, 8, 8)),
        Node("conv", "conv2d", ("input",), image, Conv((3, 3), padding=(1, 1, 1, 1)), clip=(0.0, 6.0)),
        Node("gate", "activation", ("conv",), image, activation="sigmoid"),
        Node("mul", "mul", ("conv", "gate"), image),
        Node("point", "conv2d", ("mul", "conv"), image, Conv(), residual=True),
        Node("add", "add", ("point", "mul"), image, clip=(0.0, float("inf"))),
        Node("pool", "max_pool2d", ("add",), half, pool=Pool((2, 2), (2, 2))),
        Node("average", "avg_pool2d", ("add",), half, pool=Pool((2, 2), (2, 2))),
        Node("concat", "concat", ("pool", "average"), (1, 8, 4, 4)),
        Node("neg", "foreign", ("concat",), (1, 8, 4, 4), foreign=ForeignOp("aten.neg.default", call)),
        Node("dead", "activation", ("neg",), (1, 8, 4, 4), activation="relu", clip=(0.0, float("inf"))),
        Node("flatten", "flatten", ("dead",), (1, 128)),
        Node("fc", "linear", ("flatten",), (1, 10), Conv()),
    )
    shapes = {"conv": (4, 3, 3, 3), "point": (4, 4, 1, 1), "fc": (10, 128, 1, 1)}
    weight = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    bias = {name: np.zeros(shape[0], np.float32) for name, shape in shapes.items()}
    norm = {"point": (np.array([0, 1, -1, 0], np.float32), np.array([1, 1, 2, 1], np.float32))}
    return Model("small", Graph(nodes, "fc"), Parameters(weight, bias, norm))


@pytest.fixture(scope="module")
def observed() -> tuple[Model, StatisticsRecord]:
    model = network()
    images = np.random.default_rng(0).uniform(-2, 2, (8, 3, 8, 8)).astype(np.float32)
    return model, observe(model, images, batch_size=4)


@pytest.mark.parametrize("mode", MODES)
def test_ranges_of_a_network(observed: tuple[Model, StatisticsRecord], mode: CalibrationMode) -> None:
    model, record = observed
    ranges = activation_ranges(record, model, Calibration(mode=mode), (-2.0, 2.0))
    assert list(ranges) == [node.name for node in model.graph.nodes]
    for node in model.graph.nodes:
        low, high = ranges[node.name]
        assert low <= 0 <= high
        assert 1e-9 < high - low < float("inf")
        least, most = node.clip or (-np.inf, np.inf)
        assert least <= low and high <= most
    assert ranges["pool"] == ranges["add"]
    assert ranges["flatten"] == ranges["dead"]
    assert ranges["input"][0] >= -2.0 and ranges["input"][1] <= 2.0


def test_max_is_the_observed_range(observed: tuple[Model, StatisticsRecord]) -> None:
    model, record = observed
    ranges = activation_ranges(record, model, Calibration(mode="max"), (-9.0, 9.0))
    assert ranges["point"] == (record.tensors["point"].minimum, record.tensors["point"].maximum)


def test_global_scale_follows_its_rules() -> None:
    ranges = activation_ranges(None, network(), Calibration(mode="global_scale", global_scale=5.0), (-1.0, 2.0))
    assert ranges == {
        "input": (-1.0, 2.0),
        "conv": (0.0, 5.0),
        "gate": (0.0, 1.0),
        "mul": (0.0, 5.0),
        "point": (-9.0, 7.0 + 5.0),
        "add": (0.0, 17.0),
        "pool": (0.0, 17.0),
        "average": (0.0, 17.0),
        "concat": (0.0, 17.0),
        "neg": (-5.0, 5.0),
        "dead": (0.0, 5.0),
        "flatten": (0.0, 5.0),
        "fc": (-5.0, 5.0),
    }


@pytest.mark.parametrize("name, wanted", [("hardswish", (-0.375, 4.0)), ("tanh", (-1.0, 1.0)), ("relu6", (0.0, 4.0))])
def test_global_scale_bounds_activations(name: str, wanted: tuple[float, float]) -> None:
    nodes = (Node("input", "input", (), (1, 3)), Node("act", "activation", ("input",), (1, 3), activation=name))
    model = Model("activation", Graph(nodes, "act"), Parameters())
    assert activation_ranges(None, model, Calibration(mode="global_scale"), (-4.0, 4.0))["act"] == wanted


def test_a_record_is_asked_for_where_it_is_needed() -> None:
    with pytest.raises(CalibrationError, match="global_scale"):
        activation_ranges(None, network(), Calibration(mode="mse"), (-1.0, 1.0))


def test_a_record_of_another_model_is_refused(observed: tuple[Model, StatisticsRecord]) -> None:
    model, record = observed
    fewer = replace(record, tensors={name: t for name, t in record.tensors.items() if name != "mul"})
    with pytest.raises(CalibrationError, match="'mul'"):
        activation_ranges(fewer, model, Calibration(), (-1.0, 1.0))
