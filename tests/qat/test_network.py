"""The fake-quantized network is the program that lowering makes of it: steps, values, decisions."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from networks import NETWORKS, images, network, ranges_of

from qsearch.build.foreign import run_foreign
from qsearch.config import QuantConfig
from qsearch.errors import SpaceError
from qsearch.models.graph import Model
from qsearch.models.interpret import forward
from qsearch.qat.network import FakeQuantizedNetwork
from qsearch.qat.plan import QatPlan, plan_finetuning
from qsearch.quantize.assign import INTEGER_FORMS, assign_forms
from qsearch.quantize.equalization import equalize, likely_maximum
from qsearch.quantize.lower import precisions, value_affines
from qsearch.quantize.reference import run_program
from qsearch.quantize.weight_store import WeightStore

MIXED = {
    "default_precision": "w4a8",
    "rules": [
        {"position": [0], "precision": "int16"},
        {"position": [1], "precision": "fp32"},
        {"position": [2, -1], "precision": "int8"},
    ],
}
CONFIGS = {
    "w4a8": {"default_precision": "w4a8"},
    "layer_wise": {"default_precision": "w4a8", "granularity": "layer_wise"},
    "symmetric": {"activations": "symmetric"},
    "power_of_two": {"weight_scale": "power_of_two"},
    "int16": {"default_precision": "int16"},
    "mixed": MIXED,
}


@cache
def opened(name: str) -> tuple[Model, dict[str, tuple[float, float]]]:
    """A network and the ranges of its values, the same for all configurations here."""
    model = network(name)[0]
    return model, ranges_of(model, QuantConfig())


def plan_of(name: str, config: QuantConfig) -> QatPlan:
    model, ranges = opened(name)
    return plan_finetuning(model, config, ranges, WeightStore())


def moved(name: str, config: QuantConfig, seed: int = 0) -> FakeQuantizedNetwork:
    """A network as training may leave it: weights, biases and steps changed at random."""
    found = FakeQuantizedNetwork(plan_of(name, config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in found.trained.values():
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.05)
    return found


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("name", ["residual", "bottlenecks", "excite", "shuffle", "vit"])
def test_lowering_finds_the_learned_steps(name, config):
    config = QuantConfig.model_validate(config)
    one = moved(name, config)
    tuned = one.tuned()
    assignment = assign_forms(tuned.model.graph, precisions(tuned.model, config))
    affines = value_affines(tuned.model, assignment, tuned.ranges, WeightStore(), config.activations)
    assert affines.keys() == one.plan.values.keys()
    for key, affine in affines.items():
        planned = one.plan.values[key]
        if planned.root not in one.plan.steps:
            continue
        learned = np.float32(one._step(planned).item())
        if key[1] == "uint8":
            assert (affine.scale, affine.zero_point) == (learned, planned.zero_point), key
        else:
            # The bits of int16 values are shared with the weights, which have changed.
            assert affine.scale * affine.limits.qmax == pytest.approx(learned * planned.limits.qmax, rel=0.01), key


@pytest.mark.parametrize("form", CONFIGS)
@pytest.mark.parametrize("name", ["residual", "bottlenecks", "excite", "shuffle", "vit"])
def test_forward_is_the_reference_of_the_lowered_program(name, form):
    one = moved(name, QuantConfig.model_validate(CONFIGS[form]))
    program, plan = one.tuned().lower(), one.plan
    given, found = images(4, 7), {}
    weights, biases = one._parameters()
    with torch.no_grad():
        logits = forward(
            plan.model,
            torch.tensor(given),
            read=one._read,
            weight=weights,
            bias=biases,
            on_value=lambda node, value: found.update({node.name: value.numpy()}),
        ).numpy()
        assert np.array_equal(one(torch.tensor(given)).numpy(), logits)
    apart, same = [], 0
    for i in range(len(given)):
        reference = run_program(program, given[i : i + 1], lambda op, inputs: run_foreign(op.key, op.constants, inputs))
        same += int(reference[program.output.name].argmax() == logits[i].argmax())
        np.testing.assert_allclose(reference[program.output.name][0], logits[i], atol=0.1 * logits.std())
        for node in plan.model.graph.nodes:
            key = node.name, "uint8"
            if f"{node.name}:uint8" not in reference or node.op not in ("conv2d", "linear", "add", "input"):
                continue
            planned, step = plan.values[key], one._step(plan.values[key]).item()
            expected = reference[f"{node.name}:uint8"]
            real = found[node.name][i : i + 1]
            real = real.transpose(0, 2, 3, 1) if real.ndim == 4 else real
            whole = np.clip(np.rint(real.reshape(expected.shape) / step) + planned.zero_point, 0, 255)
            apart.append(np.abs(whole - expected.astype(np.int64)).ravel())
    # Values that lie between two integers go either way, and what they change rarely adds up to a second step.
    steps = np.concatenate([np.zeros(1), *apart])
    # 16-bit layers share their bits between weights and values anew, and softmax rounds on its own: then more of them do.
    loose = name == "vit" or form in ("int16", "mixed")
    assert (steps > 0).mean() < (0.08 if loose else 0.01) and (steps > 1).mean() < (0.005 if loose else 0.0005)
    assert same == len(given)


def test_clips_of_channels_are_trained_through_and_lowered():
    model = network("residual")[0]
    equalized = equalize(model, likely_maximum(model))
    assert any(node.clip_high for node in equalized.graph.nodes)
    config = QuantConfig(default_precision="w4a8", equalization=True)
    one = FakeQuantizedNetwork(plan_finetuning(equalized, config, ranges_of(equalized, config), WeightStore()))
    program, given = one.tuned().lower(), images(4, 7)
    with torch.no_grad():
        logits = one(torch.tensor(given)).numpy()
    for i in range(len(given)):
        np.testing.assert_allclose(
            run_program(program, given[i : i + 1])[program.output.name][0], logits[i], atol=0.05 * logits.std()
        )


def test_integers_and_scales_are_those_that_are_multiplied():
    one = moved("residual", QuantConfig(default_precision="w4a8", granularity="layer_wise"))
    tuned, (weights, biases) = one.tuned(), one._parameters()
    assert tuned.layers.keys() == weights.keys()
    for name, layer in tuned.layers.items():
        real = layer.weight.values.astype(np.float32) * layer.weight.scale[:, None, None, None]
        np.testing.assert_array_equal(real.transpose(0, 3, 1, 2), weights[name].detach().numpy())
        assert len(set(layer.weight.scale.tolist())) == 1 and layer.weight.values.min() >= -8 and layer.weight.values.max() <= 7
        assert not layer.shift.any()
    lowered = {op.name: op for op in tuned.lower().ops}
    for name, bias in biases.items():
        unit = one._weight_step(name).item() * one._step(one.plan.weights[name].reads).item()
        sums, zero = tuned.layers[name].weight.sums, one.plan.weights[name].reads.zero_point
        whole = (lowered[name].constants["bias"] + zero * sums) * unit
        np.testing.assert_allclose(whole, bias.detach().numpy(), rtol=1e-4, atol=1e-6)


def test_everything_that_is_trained_gets_a_gradient():
    one = moved("excite", QuantConfig.model_validate(MIXED))
    one(torch.tensor(images(4))).square().sum().backward()
    missing = [name for name, value in one.trained.items() if value.grad is None or not bool(value.grad.isfinite().all())]
    assert not missing
    assert not any(float(value.grad.abs().max()) == 0 for name, value in one.trained.items() if name.startswith("step:"))


def test_powers_of_two_stay():
    one = moved("residual", QuantConfig(weight_scale="power_of_two"))
    assert not any(name.startswith("weight_step:") for name in one.trained)
    for layer in one.tuned().layers.values():
        assert np.array_equal(np.exp2(np.rint(np.log2(layer.weight.scale))), layer.weight.scale)


def test_what_is_copied_shares_a_step():
    plan = plan_of("shuffle", QuantConfig())
    for node in plan.model.graph.nodes:
        if node.op in ("view", "gather", "flatten", "max_pool2d"):
            forms = [form for form in INTEGER_FORMS if (node.name, form) in plan.values]
            assert all(plan.values[node.name, form].root == plan.values[node.inputs[0], form].root for form in forms)
    assert len(plan.steps) < len({name for name, _ in plan.values})


def test_equal_ranges_alone_share_nothing():
    # Both are clipped to 6 and start with one scale, and each shall learn its own.
    plan = plan_of("residual", QuantConfig())
    roots = {plan.values[name, "uint8"].root for name in ("stem.0", "depth.0")}
    assert len(roots) == 2


@pytest.mark.parametrize(
    "config, words",
    [
        ({"default_precision": "fp32"}, "nothing to fine-tune"),
        ({"default_precision": "fp16"}, "'stem.0' is to be fp16"),
        ({"default_precision": "w4a8", "granularity": "group_wise"}, "'stem.0' has granularity group_wise"),
        ({"default_precision": "w4a8", "weight_symmetry": "asymmetric"}, "'stem.0' has asymmetric weights"),
    ],
)
def test_refusals(config, words):
    with pytest.raises(SpaceError, match=words):
        plan_of("residual", QuantConfig.model_validate(config))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_operation_can_be_trained_through(name):
    one = moved(name, QuantConfig())
    one(torch.tensor(images(2))).square().sum().backward()
    layers = [node.name for node in one.plan.model.graph.layers]
    assert all(float(one.trained[f"weight:{layer}"].grad.abs().max()) > 0 for layer in layers)
