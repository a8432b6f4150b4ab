"""The sensitivity table: against divergences computed exactly, where those are known, and on disk."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import MODELS, NETWORKS, SHAPE, images
from scipy.special import log_softmax
from scipy.stats import spearmanr
from torch import nn

from qsearch.calibrate.observe import observe
from qsearch.calibrate.ranges import activation_ranges
from qsearch.config import QuantConfig
from qsearch.errors import DataError, StudyError
from qsearch.models.import_torch import import_model
from qsearch.models.interpret import forward, interpret
from qsearch.quantize.bias_correction import input_means
from qsearch.quantize.perturbation import assigned, rounded, rounded_reads, weight_change
from qsearch.quantize.weight_store import WeightStore
from qsearch.search.tables import sensitivity
from qsearch.search.tables.projection import fisher_direction
from qsearch.search.tables.sensitivity import SensitivityRequest, measure_sensitivity
from qsearch.search.tables.sensitivity_file import kept_sensitivity, load_sensitivity, save_sensitivity, sensitivity_path

PLAIN = QuantConfig()
LAYER_WISE = QuantConfig(granularity="layer_wise")
POWERS = QuantConfig(weight_scale="power_of_two")
IDENTITY = {"model": "m", "data": "d", "target": "t"}


def ignore(done, total):
    pass


def request(model, count, precisions=("fp32", "int8", "w4a8"), **changes):
    record = observe(model, images(32), 16)
    made = SensitivityRequest(
        model,
        images(count, 7),
        lambda config: activation_ranges(record, model, config.calibration, (-6.0, 6.0)),
        WeightStore(),
        lambda config: input_means(model, config.bias_correction, record),
        {layer.name: precisions for layer in model.graph.layers},
        [PLAIN],
    )
    return replace(made, **changes)


def exact(asked, precision):
    """Mean divergence of the outputs of the network with rounded reads and weights."""
    model, store = asked.model, asked.weights
    reads = rounded_reads(model, assigned(model.graph, precision), asked.ranges(PLAIN), store)
    weight = {
        name: torch.from_numpy(
            model.parameters.weight[name] + weight_change(model, (name, chosen), PLAIN.weights, store, None)[0]
        )
        for name, chosen in precision.items()
    }
    x = torch.from_numpy(asked.images)
    plain = log_softmax(interpret(model, x).double().numpy(), 1)
    with torch.no_grad():
        moved = forward(model, x, read=lambda node, i, value: rounded(value, reads.get((node.name, i), ())), weight=weight)
    return (np.exp(plain) * (plain - log_softmax(moved.double().numpy(), 1))).sum(1).mean()


def test_shorter_floats_cost_more():
    asked = request(MODELS["bottlenecks"], 8, ("fp32", "fp16", "fp8"))
    for of in measure_sensitivity(asked, ignore).divergence(PLAIN).values():
        assert of[0] == 0 < of[1] < 0.02 * of[2]


def test_directions_have_the_fisher_matrix_as_covariance():
    logits = torch.tensor([[1.0, -2.0, 3.0, 0.5, -40.0]])
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=5)))
    drawn = fisher_direction(logits.expand(len(signs), 5), signs).double()
    p = logits[0].double().softmax(0)
    torch.testing.assert_close(drawn.T @ drawn / len(signs), torch.diag(p) - p[:, None] * p, rtol=1e-5, atol=1e-9)


def test_certain_outputs_have_no_direction():
    assert not fisher_direction(torch.tensor([[900.0, 0.0, -900.0]]), torch.ones(1, 3)).any()


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_agree_with_running_the_network_once_per_change(name, monkeypatch):
    asked = request(MODELS[name], 2, ("fp32", "int8"))
    found = measure_sensitivity(asked, ignore)

    def fail(*arguments, **options):
        raise RuntimeError("derivative for aten::foreign is not implemented")

    monkeypatch.setattr(torch.autograd, "grad", fail)
    direct = measure_sensitivity(asked, ignore)
    for one, other in ((found.activation, direct.activation), (found.weight, direct.weight)):
        assert one.any()
        assert np.linalg.norm(one - other) < 0.1 * np.linalg.norm(other)


@pytest.mark.parametrize("name", ["residual", "excite", "vit"])
def test_entries_are_the_divergences_of_one_layer_at_a_time(name):
    asked = request(MODELS[name], 96)
    entries = measure_sensitivity(asked, ignore).divergence(PLAIN)
    pairs = [(layer, place, p) for layer, names in asked.layers.items() for place, p in enumerate(names) if p != "fp32"]
    found = np.array([entries[layer][place] for layer, place, _ in pairs])
    expected = np.array([exact(asked, {layer: p}) for layer, _, p in pairs])
    assert spearmanr(found, expected)[0] > 0.9
    # The mean of 96 samples with a chi-squared distribution of one degree each, and what is not of second order.
    off = np.abs(np.log(found / expected))
    assert np.median(off) < 0.3
    assert off.max() < np.log(4)
    assert all(row[0] == 0.0 for row in entries.values())


def test_coupling_is_what_two_layers_add_together():
    """Two layers that do the same to the outputs: together four times one of them, not twice."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Linear(8, 5)
            self.b.load_state_dict(self.a.state_dict())

        def forward(self, x):
            return self.head((self.a(x) + self.b(x)).mean((2, 3)))

    torch.manual_seed(0)
    asked = request(import_model("twice", Twice().eval(), SHAPE), 64)
    table = measure_sensitivity(asked, ignore)
    entries, coupling = table.divergence(PLAIN), table.coupling(("a", "b"), PLAIN)
    assert coupling.shape == (3, 3)
    assert not coupling[0].any()
    assert not coupling[:, 0].any()
    assert coupling[2, 2] == pytest.approx(2 * entries["a"][2], rel=0.2)
    # The one that is added last also rounds the sum, for the pooling that follows in integers.
    together = entries["a"][2] + entries["b"][2] + coupling[2, 2]
    assert together == pytest.approx(exact(asked, {"a": "w4a8", "b": "w4a8"}), rel=0.4)


def test_every_setting_of_a_space_is_in_the_table():
    clipped = {"calibration": {"mode": "percentile", "percentile": 90.0}}
    configs = [
        PLAIN,
        LAYER_WISE,
        POWERS,
        *(QuantConfig.model_validate({**one.to_json(), **clipped}) for one in (PLAIN, LAYER_WISE)),
    ]
    asked = request(MODELS["residual"], 32, configs=configs)
    table = measure_sensitivity(asked, ignore)
    plain, layer_wise, powers, percentile, both = (sum(row.sum() for row in table.divergence(one).values()) for one in configs)
    assert percentile > 2 * plain
    assert layer_wise > plain
    assert powers > plain
    assert both > layer_wise
    alone = measure_sensitivity(replace(asked, configs=configs[-1:]), ignore)
    for layer, row in alone.divergence(configs[-1]).items():
        np.testing.assert_allclose(row, table.divergence(configs[-1])[layer], rtol=1e-4)


def test_a_corrected_bias_is_in_the_table():
    configs = [LAYER_WISE, QuantConfig(granularity="layer_wise", bias_correction="measured")]
    table = measure_sensitivity(request(MODELS["residual"], 32, ("fp32", "w4a8"), configs=configs), ignore)
    plain, corrected = (sum(row.sum() for row in table.divergence(one).values()) for one in configs)
    assert corrected < plain


@pytest.mark.parametrize("corrected", [False, True])
def test_large_networks_are_measured_a_few_layers_at_a_time(monkeypatch, corrected):
    model = MODELS["bottlenecks"]
    configs = [PLAIN, LAYER_WISE, QuantConfig(bias_correction="measured")] if corrected else [PLAIN, LAYER_WISE]
    asked, passes = request(model, 6, configs=configs), []
    whole = measure_sensitivity(asked, ignore)
    largest = max(weight.nbytes for weight in model.parameters.weight.values())
    monkeypatch.setattr(sensitivity, "MOST_HELD", 3 * largest)
    parts = measure_sensitivity(asked, lambda *counts: passes.append(counts))
    assert 2 < len(passes) // 6 < len(model.graph.layers)
    assert passes == [(n + 1, len(passes)) for n in range(len(passes))]
    np.testing.assert_allclose(parts.weight, whole.weight, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(parts.activation, whole.activation)


def test_progress_counts_images():
    seen = []
    measure_sensitivity(request(MODELS["residual"], 3), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_no_images_are_refused():
    with pytest.raises(DataError, match="at least one image"):
        measure_sensitivity(request(MODELS["residual"], 0), ignore)


def same(one, other):
    equal = [one.layers == other.layers, one.range_keys == other.range_keys, one.weight_keys == other.weight_keys]
    return all(equal) and np.array_equal(one.activation, other.activation) and np.array_equal(one.weight, other.weight)


def test_a_table_is_measured_once_and_again_when_its_file_is_damaged(tmp_path):
    asked = request(MODELS["residual"], 2)
    seen = []

    def kept(of):
        return kept_sensitivity(tmp_path / "tables", IDENTITY, of, lambda done, total: seen.append(done))

    first = kept(asked)
    assert same(kept(asked), first)
    assert seen == [1, 2]
    (path,) = (tmp_path / "tables").iterdir()
    assert path == sensitivity_path(tmp_path / "tables", IDENTITY, asked)
    whole = path.read_bytes()
    for damaged in (b"", whole[:-40], whole[:400] + bytes([whole[400] ^ 1]) + whole[401:], b"PK" + bytes(100)):
        path.write_bytes(damaged)
        assert load_sensitivity(path) is None
        assert same(kept(asked), first)
    assert len(seen) == 10
    kept(replace(asked, seed=1))
    kept(replace(asked, images=asked.images[::-1]))
    assert len(list((tmp_path / "tables").iterdir())) == 3


def test_a_table_that_cannot_be_written_says_so(tmp_path):
    table = measure_sensitivity(request(MODELS["residual"], 1), ignore)
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="cannot write the sensitivity table"):
        save_sensitivity(table, tmp_path / "file" / "table.npz")
