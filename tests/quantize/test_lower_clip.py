"""Layers whose fused clip has a high end per output channel: lowered in every precision, computed as the float model does."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from kernel_runner import run_kernel, target_named
from networks import images, network, ranges_of

from qsearch.config import QuantConfig
from qsearch.models.graph import Graph, Model
from qsearch.models.interpret import interpret
from qsearch.quantize.lower import lower
from qsearch.quantize.reference import run_program
from qsearch.quantize.weight_store import WeightStore

PLAIN = network("residual")[0]
LAYERS = ("stem.0", "depth.0", "project.0", "head")
# Of the logits' standard deviation.
TOLERANCE = {"fp32": 1e-5, "int16": 0.002, "int8": 0.1, "w4a8": 0.3}


def clipped() -> Model:
    """A convolution, a depthwise one, one with a residual and a linear layer, every channel clipped at its own end."""
    rng, ends, nodes = np.random.default_rng(0), {}, dict(PLAIN.graph.by_name)
    for name in LAYERS:
        node = nodes[name]
        reached = ranges_of(PLAIN, QuantConfig())[name][1]
        ends[f"{name}.high"] = high = (reached * rng.uniform(0.1, 0.6, node.shape[1])).astype(np.float32)
        low = node.clip[0] if node.clip else -np.inf
        nodes[name] = replace(node, clip=(low, float(high.max())), clip_high=f"{name}.high")
    parameters = replace(PLAIN.parameters, constants=PLAIN.parameters.constants | ends)
    return Model("clipped", Graph(tuple(nodes.values()), PLAIN.graph.output), parameters)


MODEL = clipped()
RANGES = ranges_of(MODEL, QuantConfig())


def test_the_float_model_stops_at_each_channels_end():
    values = {}
    interpret(MODEL, torch.from_numpy(images(4)), lambda node, value: values.setdefault(node.name, value.numpy()))
    for name in LAYERS:
        high = MODEL.parameters.constants[f"{name}.high"]
        reached = values[name].max(tuple(axis for axis in range(values[name].ndim) if axis != 1))
        assert (reached <= high).all() and (reached == high).any()


@pytest.mark.parametrize("precision", TOLERANCE)
def test_the_program_computes_what_the_model_computes(precision):
    program = lower(MODEL, QuantConfig(default_precision=precision), RANGES, WeightStore())
    assert {op.name for op in program.ops if op.key.clips_channels} == set(LAYERS)
    x = images(8, 3)
    found = np.concatenate([run_program(program, image[None])[program.output.name] for image in x])
    expected, without = (interpret(model, torch.from_numpy(x)).numpy() for model in (MODEL, PLAIN))
    assert np.std(found - expected) < TOLERANCE[precision] * np.std(expected)
    assert np.std(without - expected) > 0.5 * np.std(expected)


@pytest.mark.parametrize("precision", ["int16", "int8"])
def test_kernels_give_the_programs_bits(precision):
    program = lower(MODEL, QuantConfig(default_precision=precision), RANGES, WeightStore())
    values = run_program(program, images(1, 4))
    for op in program.ops:
        if op.name in LAYERS:
            found = run_kernel(op, [values[name] for name in op.inputs], target_named("host"))
            np.testing.assert_array_equal(found, values[op.output.name], err_msg=op.name)


def test_integer_ends_are_whole_steps_within_the_tensors_limits():
    program = lower(MODEL, QuantConfig(), RANGES, WeightStore())
    for op in program.ops:
        if op.key.clips_channels and op.output.dtype == "uint8":
            high, (_, _, zero_point, qmin, qmax) = op.constants["clip_high"], op.constants["integers"]
            assert high.dtype == np.float32 and (high == np.rint(high)).all()
            assert high.max() + zero_point == qmax and (high + zero_point >= qmin).all()


def test_the_ends_are_part_of_the_models_identity():
    high = MODEL.parameters.constants["head.high"]
    changed = replace(MODEL.parameters, constants=MODEL.parameters.constants | {"head.high": high / 2})
    assert len({PLAIN.fingerprint, MODEL.fingerprint, replace(MODEL, parameters=changed).fingerprint}) == 3
