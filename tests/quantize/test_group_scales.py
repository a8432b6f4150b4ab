"""Weights in groups: their error beside that of symmetric scales per channel, their levels, their way into a program."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import network, ranges_of
from test_precisions import images, reference, relative_error

from qsearch.build.cache import KernelCache
from qsearch.build.link import Linker
from qsearch.build.target import open_target
from qsearch.config import QuantConfig
from qsearch.errors import QuantizeError
from qsearch.qtype import W4A8, IntRange
from qsearch.quantize.group_scales import GroupForm, coarsened, group_integers, group_weights, with_integers
from qsearch.quantize.lower import lower
from qsearch.quantize.weight_store import GROUP, WeightStore
from qsearch.quantize.weights import QuantizedWeight, quantize_weight, weight_scales

MODEL = network("residual")[0]
RANGES = ranges_of(MODEL, QuantConfig())
FORMS = [
    GroupForm(size, offsets, search) for size in (0, 8, 16, 32) for offsets in (0, 1) for search in (0, 1) if size or offsets
]
RELAXED = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

# Without the sixteenth integer, which lies to one side.
SYMMETRIC = IntRange("int8", -7, 7)


def symmetric(weight: np.ndarray) -> QuantizedWeight:
    return quantize_weight(weight, weight_scales(weight, W4A8.weight, "channel_wise", "max"), W4A8.weight)


def errors(weight: np.ndarray, prepared: QuantizedWeight) -> np.ndarray:
    """Squared error of every output channel."""
    restored = prepared.values * prepared.scale.astype(np.float64)[:, None, None, None]
    return np.square(restored - weight.transpose(0, 2, 3, 1)).sum((1, 2, 3))


@st.composite
def weights(draw: st.DrawFn) -> np.ndarray:
    """Of any spread, skewed or shifted, with dead channels, equal ones and outliers."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 70), st.integers(1, 3), st.integers(1, 3)))
    weight = rng.standard_normal(shape) * 10 ** -(rng.random(shape) * draw(st.floats(0, 4)))
    weight = weight + draw(st.sampled_from([0.0, 0.5, -3.0]))
    kind = draw(st.sampled_from(["plain", "dead", "equal", "outlier", "positive", "tiny"]))
    weight[0] = {"dead": 0, "equal": 0.3}.get(kind, weight[0])
    weight = np.abs(weight) if kind == "positive" else weight * {"tiny": 1e-30}.get(kind, 1.0)
    weight.ravel()[0] *= 100 if kind == "outlier" else 1
    return weight.astype(np.float32)


@RELAXED
@given(weight=weights(), form=st.sampled_from(FORMS))
def test_no_channels_error_is_above_symmetric_scales_of_channels(weight, form):
    plain = symmetric(weight)
    prepared = group_weights(weight, plain.scale, form)
    assert (errors(weight, prepared) <= 1.0001 * errors(weight, plain) + 1e-36).all()
    assert np.abs(prepared.values.astype(int)).max() <= 127 and np.isfinite(prepared.scale).all() and (prepared.scale > 0).all()
    integers = group_integers(prepared.values, prepared.group_scale, prepared.group_offset, prepared.group)
    assert integers.min() >= -8 and integers.max() <= 7
    np.testing.assert_array_equal(with_integers(prepared, integers).values, prepared.values)
    if prepared.group_scale is not None:
        assert prepared.group_scale.min() >= 1 and prepared.group_scale.max() <= 15
        assert prepared.group_scale.shape == (len(weight), *weight.shape[2:], -(-weight.shape[1] // form.size))


@pytest.mark.parametrize(
    ("form", "share"), [(GroupForm(16), 0.55), (GroupForm(32), 0.65), (GroupForm(16, True), 0.42), (GroupForm(0, True), 0.95)]
)
def test_groups_are_worth_their_bytes_on_normal_weights(form, share):
    """Beside symmetric scales per channel, of the least squared error as far as a search of scales finds it."""
    weight = np.random.default_rng(0).standard_normal((16, 256, 1, 1)).astype(np.float32)
    base = symmetric(weight).scale
    shrunk = [quantize_weight(weight, (base * factor).astype(np.float32), SYMMETRIC) for factor in np.linspace(0.5, 1, 26)]
    least = np.min([errors(weight, one) for one in shrunk], 0).sum()
    assert errors(weight, group_weights(weight, base, form)).sum() < share * least


@pytest.mark.parametrize("form", FORMS)
def test_without_a_search_no_weight_is_cut_short(form):
    weight = np.random.default_rng(0).standard_normal((16, 40, 3, 3)).astype(np.float32)
    prepared = group_weights(weight, symmetric(weight).scale, replace(form, search=False))
    step = prepared.scale[:, None, None, None] * (
        1 if prepared.group_scale is None else prepared.group_scale.max((1, 2, 3), keepdims=True)
    )
    assert (
        np.abs(prepared.values * prepared.scale[:, None, None, None] - weight.transpose(0, 2, 3, 1))
        <= 0.51 * step + prepared.scale.max()
    ).all()


@pytest.mark.parametrize("shape", [(20, 1, 5, 5), (12, 3, 3, 3)])
def test_few_input_channels_are_quantized_as_a_whole(shape):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    base = symmetric(weight).scale
    prepared, shifted = (group_weights(weight, base, GroupForm(16, offsets)) for offsets in (False, True))
    assert prepared.tables == {} and prepared.group == 0
    assert np.abs(prepared.values + 0.5).max() <= 7.5
    assert list(shifted.tables) == ["group_offset"] and shifted.group_offset.shape == (shape[0], 1, 1, 1)


def test_shifted_weights_need_an_offset():
    weight = (5 + np.random.default_rng(0).uniform(0, 1, (4, 20, 1, 1))).astype(np.float32)
    plain = symmetric(weight)
    assert errors(weight, group_weights(weight, plain.scale, GroupForm(0, True))).sum() < 0.03 * errors(weight, plain).sum()


def test_channels_below_a_bound_get_plain_scales():
    weight = np.random.default_rng(0).standard_normal((3, 32, 1, 1)).astype(np.float32)
    prepared = group_weights(weight, symmetric(weight).scale, GroupForm(16, True))
    least = prepared.scale * np.array([0.5, 40, 1], np.float32)
    raised = coarsened(weight, prepared, least)
    np.testing.assert_array_equal(raised.values[[0, 2]], prepared.values[[0, 2]])
    np.testing.assert_array_equal(raised.scale, np.maximum(least, prepared.scale))
    assert (raised.group_scale[1] == 1).all() and (raised.group_offset[1] == 0).all()
    np.testing.assert_array_equal(raised.values[1], quantize_weight(weight[1:2], least[1:2], W4A8.weight).values[0])


@pytest.mark.parametrize("size", [4, -8, 12])
def test_a_size_that_kernels_cannot_pack_is_refused(size):
    with pytest.raises(QuantizeError, match="multiple of 8"):
        group_weights(np.ones((2, 16, 1, 1), np.float32), np.ones(2, np.float32), GroupForm(size))


GROUPS = {"granularity": "group_wise", "weight_scale": "mse"}
OFFSETS = {"weight_symmetry": "asymmetric", "weight_scale": "mse"}


def lowered(settings: dict, precision: str = "w4a8"):
    config = QuantConfig.model_validate({"default_precision": precision, **settings})
    return lower(MODEL, config, RANGES, WeightStore())


@pytest.mark.parametrize("settings", [GROUPS, OFFSETS, GROUPS | OFFSETS])
def test_a_program_of_grouped_layers_is_near_the_model(settings):
    program = lowered(settings)
    size, offsets = GROUP if settings.get("granularity") else 0, "weight_symmetry" in settings
    for op in program.ops:
        if op.key.precision == "w4a8":
            few = op.constants["weight"].shape[3] < 8
            assert (op.key.weight_group, op.key.weight_offset) == (0 if few else size, offsets)
    assert relative_error("residual", program) < 0.1


def test_other_precisions_have_no_groups():
    assert not any(op.key.weight_group or "group_scale" in op.constants for op in lowered(GROUPS | OFFSETS, "int8").ops)


def test_a_linked_module_computes_it_and_counts_the_tables(tmp_path):
    import tvm

    linker = Linker(KernelCache(tmp_path, open_target("host")))
    plain = linker.plan(lower(MODEL, QuantConfig(default_precision="w4a8"), RANGES, WeightStore())).weight_bytes
    program, x = lowered(GROUPS | OFFSETS), images(1, 5)
    module = linker.build(program)
    found = module.open()["main"](tvm.runtime.tensor(x)).numpy()
    np.testing.assert_array_equal(found, reference(program, x)[program.output.name])
    assert module.weight_bytes == linker.plan(program).weight_bytes > plain
