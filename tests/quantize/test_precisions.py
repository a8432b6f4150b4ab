"""Programs of 16-bit and 4-bit layers, and of mixtures: what they compute, where they convert, that no sum overflows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import MODELS, NETWORKS, RANGES, Named, images
from torch import nn

from qsearch.build.foreign import run_foreign
from qsearch.config import QuantConfig, WeightSettings
from qsearch.models.graph import Graph
from qsearch.models.import_torch import import_model
from qsearch.models.interpret import interpret
from qsearch.qtype import PRECISIONS
from qsearch.quantize.assign import assign_forms, kernel_precision
from qsearch.quantize.lower import lower
from qsearch.quantize.reference import run_program
from qsearch.quantize.weight_store import WeightStore
from qsearch.quantize.weights import MAX_ACCUMULATOR, activation_limit

# Wide enough that nothing is clipped: what remains is rounding.
WIDE = Named(lambda name: {node: (1.5 * low, 1.5 * high) for node, (low, high) in RANGES[name].items()})
RELAXED = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def lowered(name, **options):
    return lower(MODELS[name], QuantConfig.model_validate(options), WIDE[name], WeightStore())


def reference(program, x):
    return run_program(program, x, lambda op, inputs: run_foreign(op.key, op.constants, inputs))


def relative_error(name, program):
    """Standard deviation of the error over that of the model's output."""
    errors, outputs = [], []
    for image in images(8, 3):
        outputs.append(interpret(MODELS[name], torch.from_numpy(image[None])).numpy())
        errors.append(reference(program, image[None])[program.output.name] - outputs[-1])
    return np.std(errors) / np.std(outputs)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("granularity", ["channel_wise", "layer_wise"])
@pytest.mark.parametrize("weight_scale", ["max", "power_of_two"])
def test_int16_tracks_float_far_closer_than_int8(name, granularity, weight_scale):
    found = {
        precision: relative_error(
            name, lowered(name, default_precision=precision, granularity=granularity, weight_scale=weight_scale)
        )
        for precision in ("int16", "int8")
    }
    assert found["int16"] < 0.002
    assert found["int16"] < found["int8"] / 10


@pytest.mark.parametrize("name", NETWORKS)
def test_w4a8_is_near_the_model_and_its_weights_fit_four_bits(name):
    program = lowered(name, default_precision="w4a8")
    assert relative_error(name, program) < 0.2
    weights = [op.constants["weight"] for op in program.ops if op.key.precision == "w4a8"]
    assert {weight.dtype.name for weight in weights} == {"int8"}
    assert max(np.abs(weight).max() for weight in weights) == 7


@pytest.mark.parametrize("name", NETWORKS)
@RELAXED
@given(data=st.data())
def test_any_mixture_is_near_the_model(name, data):
    """Every layer in any of the precisions: values are wanted in several forms at once."""
    layers = [layer.name for layer in MODELS[name].graph.layers]
    chosen = {layer: data.draw(st.sampled_from(list(PRECISIONS))) for layer in layers}
    program = lowered(name, precision=chosen)
    kinds = MODELS[name].graph.layer_types
    expected = {layer: kernel_precision(precision, kinds[layer]) for layer, precision in chosen.items()}
    assert {op.name: op.key.precision for op in program.ops if op.key.kind == "conv2d"} == expected
    assert relative_error(name, program) < (0.25 if {"w4a8", "fp8"} & {*chosen.values()} else 0.05)
    assert_within_accumulator(program)


def assert_within_accumulator(program):
    """No integer that an int16 layer can read takes its sum out of int32, and what it reads is held to that."""
    largest = {}
    for op in program.ops:
        if op.key.kind in ("max_pool2d", "to_channels_first", "gather"):
            largest[op.output.name] = largest.get(op.inputs[0])
        elif "integers" in op.constants:
            largest[op.output.name] = int(np.abs(op.constants["integers"][3:]).max())
        if op.key.precision == "int16":
            total = np.abs(op.constants["weight"].astype(np.int64)).reshape(op.key.shapes[-1][-1], -1).sum(1)
            assert (total * largest[op.inputs[0]] + np.abs(op.constants["bias"].astype(np.int64))).max() <= MAX_ACCUMULATOR


@RELAXED
@given(
    decades=st.floats(0, 6),
    equal=st.booleans(),
    bias=st.floats(-30, 30),
    seed=st.integers(0, 2**16),
)
def test_int16_sums_never_overflow(decades, equal, bias, seed):
    """Weights of any spread, all alike or mostly zero, beside a small or a large bias."""
    rng = np.random.default_rng(seed)
    model = MODELS["residual"]
    size = model.parameters.weight["head"].shape
    weight = np.ones(size) if equal else rng.standard_normal(size) * 10 ** -(rng.random(size) * decades)
    weight[0, : seed % size[1]] = 0
    parameters = replace(
        model.parameters,
        weight=model.parameters.weight | {"head": weight.astype(np.float32)},
        bias=model.parameters.bias | {"head": np.array([bias] + 6 * [0.1], np.float32)},
    )
    program = lower(
        replace(model, parameters=parameters), QuantConfig(default_precision="int16"), WIDE["residual"], WeightStore()
    )
    assert_within_accumulator(program)


@RELAXED
@given(
    outputs=st.integers(1, 5),
    inputs=st.integers(1, 3000),
    decades=st.floats(0, 6),
    equal=st.booleans(),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 2**16),
)
def test_bounded_weights_use_the_bits_there_are(outputs, inputs, decades, equal, share, seed):
    """Whatever the spread of the weights, no scale is much larger than it must be."""
    rng = np.random.default_rng(seed)
    weight = np.ones((outputs, inputs, 1, 1)) if equal else rng.standard_normal((outputs, inputs, 1, 1))
    weight = (weight * 10 ** -(rng.random(weight.shape) * decades)).astype(np.float32)
    weight[0, seed % inputs :] = 0
    largest = max(1, int(share * activation_limit(weight)))
    prepared = WeightStore().bounded("layer", weight, WeightSettings(), largest)
    values = np.abs(prepared.values.astype(np.int64)).reshape(outputs, -1)
    reach = values.sum(1) * largest
    assert reach.max() <= MAX_ACCUMULATOR - 2**28
    assert ((reach > 0.8 * (MAX_ACCUMULATOR - 2**28)) | (values.max(1) == 2**15 - 1) | (values.max(1) == 0)).all()
    restored = prepared.values[:, 0, 0] * prepared.scale[:, None]
    np.testing.assert_allclose(restored, weight[:, :, 0, 0], atol=0.51 * prepared.scale.max())


def test_weights_do_not_depend_on_the_calibration():
    store, model = WeightStore(), MODELS["residual"]
    config = QuantConfig(default_precision="int16")
    wider = {name: (2 * low, 2 * high) for name, (low, high) in WIDE["residual"].items()}
    first, second = (
        {op.name: op.constants["weight"] for op in lower(model, config, ranges, store).ops if "weight" in op.constants}
        for ranges in (WIDE["residual"], wider)
    )
    assert all(first[name] is second[name] for name in ("grouped", "project.0", "head"))


def conversions(name, **options):
    kinds = ("quantize", "dequantize", "requantize")
    return [(op.name, op.key.dtypes) for op in lowered(name, **options).ops if op.key.kind in kinds]


@pytest.mark.parametrize("precision", ["int16", "w4a8"])
def test_neighbouring_integer_layers_never_pass_through_float(precision):
    program = lowered("residual", default_precision=precision)
    dtype = PRECISIONS[precision].activation.dtype
    assert conversions("residual", default_precision=precision) == []
    assert all(set(op.key.dtypes[:-1]) == {dtype} for op in program.ops[1:] if not op.key.residual)


@pytest.mark.parametrize(("inner", "outer"), [("int16", "int8"), ("int8", "int16"), ("int16", "w4a8"), ("int16", "fp32")])
def test_a_layer_writes_what_its_readers_want(inner, outer):
    """A single layer of another precision needs no conversion, nor does a pool between two precisions."""
    options = {"default_precision": outer, "precision": {"depth.0": inner}}
    assert conversions("residual", **options) == []
    by_name = {op.name: op for op in lowered("residual", **options).ops}
    assert by_name["expand.0"].output.dtype == PRECISIONS[inner].activation.dtype
    assert by_name["depth.0"].output.dtype == PRECISIONS[outer].activation.dtype


def test_a_pool_takes_its_readers_form():
    program = lowered("residual", default_precision="int16", precision={"grouped": "int8"})
    pool = next(op for op in program.ops if op.key.kind == "max_pool2d")
    assert pool.key.dtypes == ("uint8", "uint8")
    assert not [op for op in program.ops if op.key.kind == "requantize"]


def test_readers_of_two_widths_share_one_conversion():
    """The stem's value is read by an int16 layer and, as a residual, by an int8 one, which takes it as it is."""
    options = {"default_precision": "int8", "precision": {"expand.0": "int16"}}
    assert conversions("residual", **options) == []
    # Both branches read the image, in two widths: it is stored in float, and quantized once for each.
    assert [dtypes for _, dtypes in conversions("excite", default_precision="int8", precision={"a": "int16"})][:2] == [
        ("float32", "int16"),
        ("float32", "uint8"),
    ]


def test_a_value_wanted_in_both_widths_is_requantized():
    """The gate's factor is a uint8 table's output; its product with an int16 value is 16 bits wide."""
    program = lowered("excite", default_precision="int16", precision={"excite": "int8"})
    assert [op.key.dtypes for op in program.ops if op.key.kind == "requantize"] == [("uint8", "int16")]
    assert [op.key.dtypes for op in program.ops if op.key.kind == "lookup"] == [("uint8", "uint8")]
    assert {op.key.dtypes for op in program.ops if op.key.kind == "activation"} == {("int16", "int16")}


@pytest.mark.parametrize(
    ("attention", "product", "inside"),
    [("int8", "int8", "uint8"), ("w4a8", "int8", "uint8"), ("int16", "fp32", "float32"), ("fp32", "fp32", "float32")],
)
def test_products_follow_the_layers_that_feed_them(attention, product, inside):
    """Scores and values of the first block; the softmax between them, and the second block's products, as well."""
    by_name = {op.name: op for op in lowered("vit", precision={"blocks.0.attention": attention}).ops}
    for name in ("scores", "values"):
        op = by_name[f"blocks.0.attention.{name}"]
        assert op.key.precision == product and op.key.dtypes[:2] == (inside, inside)
        assert by_name[f"blocks.1.attention.{name}"].key.precision == "int8"
    assert by_name["blocks.0.attention.softmax"].key.dtypes == ("float32", inside)
    assert by_name["blocks.0.attention.values"].output.dtype == "uint8"


def test_16_bit_values_are_moved_as_they_are_and_normalised_in_float():
    program = lowered("swin", default_precision="int16")
    moves = {op.key.dtypes for op in program.ops if op.key.kind == "gather"}
    assert moves == {("int16", "int16"), ("float32", "float32")}
    norms = {op.key.dtypes for op in program.ops if op.key.kind in ("layer_norm", "softmax", "l2_normalize")}
    assert norms == {("float32", "float32")}


def test_a_product_too_long_for_int32_is_computed_in_float():
    model = MODELS["vit"]
    long = [
        replace(node, matmul=replace(node.matmul, extents=(*node.matmul.extents[:-1], 2**14 + 1)))
        if node.op == "matmul"
        else node
        for node in model.graph.nodes
    ]
    chosen = dict.fromkeys((layer.name for layer in model.graph.layers), "int8")
    changed = assign_forms(Graph(tuple(long), model.graph.output), chosen).computes
    given = assign_forms(model.graph, chosen).computes
    products = [node.name for node in long if node.op == "matmul"]
    assert {given[name] for name in products} == {"uint8"} and {changed[name] for name in products} == {"float32"}


class Downsample(nn.Module):
    """Two branches that only meet in a residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side, self.main = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1, 2), nn.Conv2d(8, 16, 3, 2, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return (self.side(x) + self.main(x)).mean((2, 3))


@pytest.mark.parametrize(
    ("side", "main", "read"),
    [("int8", "int8", "uint8"), ("fp32", "int8", "float32"), ("int8", "fp32", "float32"), ("int8", "int16", "int16")],
)
def test_what_only_a_residual_reads_is_held_in_its_own_bytes(side, main, read):
    graph = import_model("downsample", Downsample().eval(), (1, 3, 9, 9)).graph
    joined = next(node for node in graph.layers if node.residual)
    chosen = {"stem": "int8", "side": side, "main": main}
    if joined.name == "side":
        chosen |= {"side": main, "main": side}
    assert assign_forms(graph, chosen).reads[joined.name][1] == read
