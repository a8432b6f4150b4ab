"""What is done to a model before it is rounded: equalization, absorption, migration, and the correction of biases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import images
from torch import nn
from transformers_tiny import VisionTransformer

from qsearch.calibrate.observe import observe
from qsearch.calibrate.record import StatisticsRecord
from qsearch.config import WeightSettings
from qsearch.models.graph import Model
from qsearch.models.import_torch import import_model
from qsearch.models.interpret import interpret
from qsearch.quantize.bias_absorption import absorb_high_biases
from qsearch.quantize.bias_correction import clipped_normal_mean, input_means, mean_error
from qsearch.quantize.equalization import equalize, links, reader_weight
from qsearch.quantize.migration import migrate
from qsearch.quantize.variants import Variants
from qsearch.quantize.weight_store import WeightStore

SHAPE = (1, 3, 12, 10)


class Chain(nn.Module):
    """Layers with one reader each: strided, depthwise, pooled, grouped, flattened over several pixels; ReLU, ReLU6 and none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6())
        self.depth = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8), nn.ReLU6())
        self.point = nn.Sequential(nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.grouped = nn.Sequential(nn.Conv2d(12, 8, 3, 1, 1, groups=2), nn.BatchNorm2d(8))
        self.head = nn.Linear(8 * 3 * 2, 7)

    def forward(self, x):
        return self.head(self.grouped(self.pool(self.point(self.depth(self.stem(x))))).flatten(1))


def chain(seed: int, factor: float = 30.0) -> Model:
    """A chain whose channels differ in range by a factor, some of them dead."""
    torch.manual_seed(seed)
    module = Chain().eval()
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.mul_(factor ** torch.rand(len(layer.weight)))
                layer.bias.normal_(1.0, 2.0)
                layer.running_var.uniform_(0.5, 2.0)
        module.point[0].weight[3] = 0.0
    return import_model("chain", module, SHAPE)


def seen(record: StatisticsRecord) -> dict[str, np.ndarray]:
    return {name: np.maximum(np.abs(one.channel_minimum), np.abs(one.channel_maximum)) for name, one in record.tensors.items()}


def outputs(model: Model, data: np.ndarray) -> np.ndarray:
    return interpret(model, torch.from_numpy(data)).numpy()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("knows_activations", [True, False])
def test_equalization_leaves_the_float_outputs_as_they_are(seed: int, knows_activations: bool) -> None:
    model, data = chain(seed), images(16, seed)
    equal = equalize(model, seen(observe(model, data, 8)) if knows_activations else {})
    assert equal.fingerprint != model.fingerprint
    before, after = outputs(model, data), outputs(equal, data)
    assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()


def test_equalization_makes_the_ranges_of_both_sides_equal() -> None:
    equal = equalize(chain(0), {})
    found = links(equal.graph)
    assert [(link.first.name, link.second.name) for link in found] == [
        ("stem.0", "depth.0"),
        ("depth.0", "point.0"),
        ("point.0", "grouped.0"),
        ("grouped.0", "head"),
    ]
    for link in found:
        own = np.abs(equal.parameters.weight[link.first.name]).max((1, 2, 3))
        other = np.abs(reader_weight(link, equal.parameters.weight[link.second.name])).max((1, 3)).reshape(-1)
        live = own > 0
        np.testing.assert_allclose(own[live], other[live], rtol=0.05)


def test_known_activations_do_not_outgrow_their_tensor() -> None:
    model, data = chain(1), images(32, 1)
    before = seen(observe(model, data, 16))
    after = seen(observe(equalize(model, before), data, 16))
    for link in links(model.graph):
        assert after[link.first.name].max() <= before[link.first.name].max() * 1.001


def test_layers_that_share_a_reader_or_add_are_no_pair() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(width, 4, 1) for width in (3, 4, 4, 4))
            self.swish = nn.Hardswish()

        def forward(self, x):
            a = torch.relu(self.a(x))
            b = self.swish(self.b(a))
            return (self.d(self.c(b) + a)).mean((2, 3))

    assert links(import_model("branch", Branch().eval(), SHAPE).graph) == []


def test_absorbed_biases_narrow_the_activations() -> None:
    model, data = chain(2, 1.0), images(32, 2)
    # Channels that are nearly always far above zero.
    mean, deviation = model.parameters.norm["depth.0"]
    model.parameters.bias["depth.0"][:] += 2.0 - mean + 3 * deviation
    model.parameters.norm["depth.0"] = (2.0 + 3 * deviation, np.minimum(deviation, 0.3))
    absorbed = absorb_high_biases(model)
    # The readers of the stem and of `point` pad; `grouped` has no rectifier.
    changed = [
        name for name in model.parameters.bias if not np.array_equal(model.parameters.bias[name], absorbed.parameters.bias[name])
    ]
    assert changed == ["depth.0", "point.0"]
    assert seen(observe(absorbed, data, 16))["depth.0"].max() < seen(observe(model, data, 16))["depth.0"].max()


def test_absorption_changes_nothing_where_no_value_is_below() -> None:
    model, data = chain(2, 1.0), images(8, 2)
    mean, deviation = model.parameters.norm["point.0"]
    assert mean.shape == deviation.shape
    model.parameters.weight["depth.0"][:] *= 1e-3
    model.parameters.bias["depth.0"][:] = 3.0
    model.parameters.norm["depth.0"] = (np.full(8, 3.0, np.float32), np.full(8, 0.5, np.float32))
    absorbed = absorb_high_biases(model)
    np.testing.assert_allclose(outputs(absorbed, data), outputs(model, data), rtol=1e-4, atol=1e-4)
    assert not np.array_equal(absorbed.parameters.bias["point.0"], model.parameters.bias["point.0"])


def test_migration_levels_layer_norms_and_leaves_the_outputs() -> None:
    torch.manual_seed(0)
    module = VisionTransformer().eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.mul_(20.0 ** torch.rand(parameter.shape))
    model, data = import_model("vit", module, SHAPE), images(8, 0)
    before = seen(observe(model, data, 8))
    moved = migrate(model, before, 0.5)
    expected = outputs(model, data)
    assert np.abs(outputs(moved, data) - expected).max() <= 1e-5 * np.abs(expected).max()
    after = seen(observe(moved, data, 8))
    norms = [node.name for node in model.graph.nodes if node.op == "layer_norm"]
    changed = [name for name in norms if not np.array_equal(before[name], after[name])]
    assert len(changed) >= 4
    for name in changed:
        assert after[name].max() / after[name].mean() < before[name].max() / before[name].mean()


@pytest.mark.parametrize("granularity", ["channel_wise", "layer_wise"])
def test_measured_correction_takes_the_mean_error_out(granularity: str) -> None:
    model, data = chain(3), images(32, 3)
    means = input_means(model, "measured", observe(model, data, 16))
    inputs: dict[str, torch.Tensor] = {}
    interpret(model, torch.from_numpy(data), lambda node, value: inputs.update({node.name: value.clone()}))
    for node in model.graph.layers:
        x, conv = inputs[node.inputs[0]].double(), node.conv
        prepared = WeightStore().quantized(node.name, model.parameters.weight[node.name], WeightSettings(granularity))  # type: ignore[arg-type]
        rounded = prepared.values.transpose(0, 3, 1, 2).astype(np.float64) * prepared.scale[:, None, None, None]
        error = torch.from_numpy(model.parameters.weight[node.name] - rounded)
        if node.op == "linear":
            moved = torch.nn.functional.linear(x, error.flatten(1)).mean(0)
        else:
            options = (conv.stride, conv.padding[:2], conv.dilation, conv.groups)
            moved = torch.nn.functional.conv2d(x, error, None, *options).mean((0, 2, 3))
        found = mean_error(model.parameters.weight[node.name], prepared, means[node.name])
        np.testing.assert_allclose(found, moved, rtol=1e-3, atol=1e-6)


def test_means_of_a_clipped_normal() -> None:
    rng = np.random.default_rng(0)
    mean, deviation = np.array([0.0, -1.0, 5.5, 2.0, 3.0]), np.array([1.0, 2.0, 1.5, 0.0, 4.0])
    drawn = mean + deviation * rng.standard_normal((400_000, 5))
    for low, high in [(0.0, 6.0), (0.0, np.inf), (-np.inf, np.inf)]:
        np.testing.assert_allclose(clipped_normal_mean(mean, deviation, low, high), drawn.clip(low, high).mean(0), atol=0.02)


def test_analytic_means_need_no_images() -> None:
    model = chain(4)
    means = input_means(model, "analytic", None)
    assert set(means) == {"depth.0", "point.0"}
    mean, deviation = (one.astype(np.float64) for one in model.parameters.norm["stem.0"])
    expected = clipped_normal_mean(mean, deviation, 0.0, 6.0)
    # The middle of the kernel always lies on the image, of 6 x 5 pixels; its first row misses it once in six.
    np.testing.assert_allclose(means["depth.0"][:, 1, 1], expected)
    np.testing.assert_allclose(means["depth.0"][:, 0, 1], expected * 5 / 6)


class Residual(nn.Module):
    """Nothing that could be equalized: every value has two readers or none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.first(x)
        return (y + self.second(y)).mean((2, 3))


def idle(model: Model) -> frozenset[str]:
    return Variants(model, lambda given: observe(given, images(4), 4)).idle


def test_methods_know_where_they_find_nothing_to_do() -> None:
    assert idle(import_model("residual", Residual().eval(), SHAPE)) == {"equalization", "bias_absorption", "migration"}
    model = chain(0)
    assert idle(model) == {"bias_absorption", "migration"}
    deviation = model.parameters.norm["depth.0"][1]
    model = replace(model, parameters=replace(model.parameters, norm={"depth.0": (3 * deviation + 2, deviation)}))
    assert idle(model) == {"migration"}
