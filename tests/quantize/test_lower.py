"""Lowering: a program computes what the model computes, and its kernels what the reference computes."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_runner import run_kernel, target_named
from networks import MODELS, NETWORKS, RANGES, images

from qsearch.build.foreign import run_foreign
from qsearch.config import QuantConfig
from qsearch.errors import QuantizeError, SpaceError
from qsearch.models.interpret import interpret
from qsearch.quantize.lower import lower, precisions
from qsearch.quantize.reference import run_program
from qsearch.quantize.weight_store import WeightStore

# These compute in float inside, whatever they read and write: rounding differs between targets.
INEXACT = ("foreign", "layer_norm", "softmax", "l2_normalize")
RELAXED = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def lowered(name, **options):
    return lower(MODELS[name], QuantConfig.model_validate(options), RANGES[name], WeightStore())


def reference(program, x):
    return run_program(program, x, lambda op, inputs: run_foreign(op.key, op.constants, inputs))


@pytest.mark.parametrize("name", NETWORKS)
def test_float_program_equals_the_model(name):
    program = lowered(name, default_precision="fp32")
    x = images(1, 9)
    expected = interpret(MODELS[name], torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(reference(program, x)[program.output.name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("granularity", ["channel_wise", "layer_wise"])
@pytest.mark.parametrize("weight_scale", ["max", "power_of_two"])
def test_int8_program_is_near_the_model(name, granularity, weight_scale):
    program = lowered(name, granularity=granularity, weight_scale=weight_scale)
    errors, spread = [], []
    for image in images(8, 3):
        expected = interpret(MODELS[name], torch.from_numpy(image[None])).numpy()
        errors.append(reference(program, image[None])[program.output.name] - expected)
        spread.append(expected)
    assert np.std(errors) < 0.12 * np.std(spread)


@pytest.mark.parametrize("name", NETWORKS)
@RELAXED
@given(data=st.data())
def test_every_integer_operation_is_exact_in_any_mixture(name, data):
    """Whatever the mixture of precisions, each kernel gives the reference's bits on the reference's inputs."""
    names = [layer.name for layer in MODELS[name].graph.layers]
    chosen = {layer: data.draw(st.sampled_from(target_named("host").precisions)) for layer in names}
    program = lowered(name, precision=chosen)
    values = reference(program, images(1, 4))
    for op in program.ops:
        if op.key.kind in INEXACT or (op.key.precision == "fp32") or set(op.key.dtypes) == {"float32"}:
            continue
        inputs = [values[given_name] for given_name in op.inputs]
        found, expected = run_kernel(op, inputs, target_named("host")), values[op.output.name]
        if op.key.kind == "activation" and op.key.function != "clip":
            assert np.abs(found.astype(np.float64) - expected).max() <= (1 if op.output.dtype != "float32" else 1e-5)
        else:
            np.testing.assert_array_equal(found, expected, err_msg=op.name)


def test_neighbouring_integer_layers_never_pass_through_float():
    kinds = [op.key.kind for op in lowered("residual").ops]
    assert "quantize" not in kinds and "dequantize" not in kinds


def test_a_precision_change_is_paid_once_where_it_happens():
    ops = lowered("residual", precision={"depth.0": "fp32"}).ops
    assert [op.name for op in ops if op.key.kind in ("quantize", "dequantize")] == []
    by_name = {op.name: op for op in ops}
    assert by_name["expand.0"].output.dtype == "float32" and by_name["depth.0"].output.dtype == "uint8"


def test_weights_are_prepared_once_and_shared():
    store = WeightStore()
    model, config = MODELS["residual"], QuantConfig()
    first, second = (lower(model, config, RANGES["residual"], store) for _ in range(2))
    pairs = [(a, b) for a, b in zip(first.ops, second.ops, strict=True) if "weight" in a.constants]
    assert pairs and all(a.constants["weight"] is b.constants["weight"] for a, b in pairs)


def test_skips_win_over_precision():
    model = MODELS["residual"]
    config = QuantConfig(skip=("*.0",), skip_dense_layers=True, precision={"stem.0": "int8"})
    assert precisions(model, config) == {name: "int8" if name == "grouped" else "fp32" for name in model_layers(model)}
    by_index = precisions(model, QuantConfig(skip_conv_layers=(0, 4)))
    assert [name for name, precision in by_index.items() if precision == "fp32"] == ["stem.0", "grouped"]


def model_layers(model):
    return [layer.name for layer in model.graph.layers]


@pytest.mark.parametrize("options", [{"skip": ("nothing*",)}, {"skip_conv_layers": (9,)}, {"precision": {"absent": "int8"}}])
def test_a_skip_that_matches_nothing_is_refused(options):
    with pytest.raises(SpaceError):
        precisions(MODELS["residual"], QuantConfig(**options))


def test_an_impossible_range_names_the_tensor():
    ranges = RANGES["residual"] | {"stem.0": (0.0, float("inf"))}
    with pytest.raises(QuantizeError, match="stem.0"):
        lower(MODELS["residual"], QuantConfig(), ranges, WeightStore())


def test_a_channel_with_tiny_weights_keeps_its_bias():
    """A dead channel's scale would make its integer bias overflow; its output must still be its bias."""
    import dataclasses

    model = MODELS["residual"]
    weight = dict(model.parameters.weight)
    weight["head"] = weight["head"].copy()
    weight["head"][2] *= 1e-20
    bias = dict(model.parameters.bias) | {"head": np.full(7, 1.5, np.float32)}
    changed = dataclasses.replace(model, parameters=dataclasses.replace(model.parameters, weight=weight, bias=bias))
    program = lower(changed, QuantConfig(), RANGES["residual"], WeightStore())
    logits = reference(program, images(1))[program.output.name]
    assert logits[0, 2] == pytest.approx(1.5, rel=1e-3)
