"""fp16 layers and mixtures with them: accuracy, forms, conversions, saturation, what a CPU target says to them."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from networks import MODELS, NETWORKS, RANGES, images

from qsearch.build.foreign import run_foreign
from qsearch.build.target import open_target
from qsearch.config import QuantConfig
from qsearch.errors import BuildError, QuantizeError, SpaceError
from qsearch.kernels.cpu import describe_kernel
from qsearch.models.graph import Pool
from qsearch.quantize.lower import lower
from qsearch.quantize.lower_nodes import scalars
from qsearch.quantize.program import Op, OpKey, Program, Value
from qsearch.quantize.reference import run_op, run_program
from qsearch.quantize.weight_store import WeightStore
from qsearch.search.evaluation.requirements import require_asked
from qsearch.search.space import SearchSpace

RELAXED = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
WIDE = arrays.arrays(np.float32, (1, 3, 2, 4), elements=st.floats(-1e6, 1e6, width=32))


def lowered(name: str, default: str = "fp16", **precision: str) -> Program:
    chosen = {layer.replace("__", "."): one for layer, one in precision.items()}
    return lower(MODELS[name], QuantConfig(default_precision=default, precision=chosen), RANGES[name], WeightStore())


def outputs(program: Program, x: np.ndarray) -> np.ndarray:
    return run_program(program, x, lambda op, inputs: run_foreign(op.key, op.constants, inputs))[program.output.name]


def by_name(program: Program) -> Mapping[str, Op]:
    return {op.name: op for op in program.ops}


def relative_error(name: str, program: Program) -> float:
    plain, given_images = lowered(name, "fp32"), images(4, 3)
    expected = np.stack([outputs(plain, image[None]) for image in given_images])
    found = np.stack([outputs(program, image[None]) for image in given_images])
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_within_a_hundredth_of_float(name: str) -> None:
    assert 0 < relative_error(name, lowered(name)) < 0.01


@pytest.mark.parametrize("name", NETWORKS)
@RELAXED
@given(data=st.data())
def test_any_mixture_with_float_and_16_bits_is_within_a_hundredth(name: str, data: st.DataObject) -> None:
    names = [layer.name for layer in MODELS[name].graph.layers]
    chosen = {layer: data.draw(st.sampled_from(("fp32", "fp16", "int16"))) for layer in names}
    wide = {node: (1.5 * low, 1.5 * high) for node, (low, high) in RANGES[name].items()}
    program = lower(MODELS[name], QuantConfig.model_validate({"precision": chosen}), wide, WeightStore())
    assert {op.name: op.key.precision for op in program.ops if op.key.kind == "conv2d"} == chosen
    assert relative_error(name, program) < 0.01


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"foreign"}))
def test_between_fp16_layers_nothing_is_held_in_any_other_form(name: str) -> None:
    program = lowered(name)
    first, *middle, last = program.ops
    assert (first.key.kind, first.key.dtypes) == ("to_channels_last", ("float32", "float16"))
    assert {dtype for op in middle for dtype in (*op.key.dtypes, op.output.dtype)} == {"float16"}
    assert last.key.dtypes == ("float16", "float32")
    assert {op.key.precision for op in program.ops if op.key.kind in ("conv2d", "matmul")} == {"fp16"}


def test_weights_are_float16_and_biases_float32_and_prepared_once() -> None:
    store, config = WeightStore(), QuantConfig(default_precision="fp16")
    first, second = (by_name(lower(MODELS["residual"], config, RANGES["residual"], store)) for _ in range(2))
    for layer in MODELS["residual"].graph.layers:
        constants = first[layer.name].constants
        weight = MODELS["residual"].parameters.weight[layer.name]
        assert constants["weight"].dtype == np.float16 and constants["bias"].dtype == np.float32
        np.testing.assert_array_equal(constants["weight"], weight.astype(np.float16).transpose(0, 2, 3, 1))
        assert constants["weight"] is second[layer.name].constants["weight"]
        assert "multiplier" not in constants


def test_a_value_takes_two_bytes() -> None:
    assert Value("x", (1, 4, 4, 3), "float16").bytes == 96


@pytest.mark.parametrize("outer", ["int8", "int16", "fp32"])
def test_a_single_fp16_layer_needs_no_conversion(outer: str) -> None:
    program = by_name(lowered("residual", outer, depth__0="fp16"))
    dtype = {"int8": "uint8", "int16": "int16", "fp32": "float32"}[outer]
    assert program["expand.0"].key.dtypes == (dtype, "float16")
    assert program["depth.0"].key.dtypes == ("float16", dtype)
    assert not [op for op in program.values() if op.key.kind in ("quantize", "dequantize", "requantize")]


def test_float16_wins_over_integers_and_not_over_float() -> None:
    """The product of a gate and what it gates: computed in the widest of the two, float32 excepted."""
    for gate, gated, read in (("fp16", "int8", "float16"), ("int16", "fp16", "float16"), ("fp32", "fp16", "float32")):
        program = by_name(lowered("excite", gated, excite=gate))
        assert program["mul"].key.dtypes[:2] == (read, read)


@pytest.mark.parametrize(
    ("layers", "kind", "dtypes", "multipliers"),
    [
        # What an int8 table wrote, for a product in float16.
        ({"excite": "fp16"}, "requantize", ("uint8", "float16"), "a"),
        # The image, for a layer of each.
        ({"a": "fp16", "b": "int8"}, "quantize", ("float32", "float16"), None),
        # What a float16 pool reads, and a float product.
        ({"a": "fp16", "b": "fp16", "excite": "fp32"}, "dequantize", ("float16", "float32"), None),
    ],
)
def test_conversions(layers: dict[str, str], kind: str, dtypes: tuple[str, str], multipliers: str | None) -> None:
    program = lowered("excite", "int8", **layers)
    found = [op for op in program.ops if (op.key.kind, op.key.dtypes) == (kind, dtypes)]
    assert found, [(op.name, op.key.kind, op.key.dtypes) for op in program.ops]
    for op in found:
        a, _, m, low, high = op.constants["floats"]
        assert m == 1 and (a != 1) == (multipliers == "a")
        assert (low, high) == ((-65504, 65504) if dtypes[1] == "float16" else (-np.inf, np.inf))


def converting(kind: str, dtypes: tuple[str, str], **values: float) -> Op:
    given_shape, shape = (1, 3, 2, 4) if kind == "to_channels_last" else (1, 2, 4, 3), (1, 2, 4, 3)
    return Op("tested", OpKey(kind, (given_shape, shape), dtypes), ("x",), Value("y", shape, dtypes[1]), scalars(**values))


@RELAXED
@given(x=WIDE)
def test_writing_float16_rounds_to_the_nearest_and_saturates(x: np.ndarray) -> None:
    made = run_op(converting("to_channels_last", ("float32", "float16")), [x])
    held = np.clip(x.transpose(0, 2, 3, 1), -65504, 65504)
    assert made.dtype == np.float16 and np.isfinite(made).all()
    np.testing.assert_array_equal(made, held.astype(np.float16))
    # No neighbour is nearer.
    for away in (-np.inf, np.inf):
        with np.errstate(over="ignore"):
            other = np.nextafter(made, np.float16(away))
        assert (np.abs(made.astype(np.float64) - held) <= np.abs(other.astype(np.float64) - held)).all()
    # Reading it is exact: there and back again changes nothing.
    real = run_op(converting("dequantize", ("float16", "float32")), [made])
    assert real.dtype == np.float32
    np.testing.assert_array_equal(run_op(converting("quantize", ("float32", "float16")), [real]), made)


@RELAXED
@given(x=arrays.arrays(np.uint8, (1, 2, 4, 3)), zero_point=st.integers(0, 255), exponent=st.integers(-10, 10))
def test_uint8_survives_float16(x: np.ndarray, zero_point: int, exponent: int) -> None:
    """Ten bits and a power of two hold what eight bits held."""
    scale, integers = 2.0**exponent, {"zero_point": zero_point}
    there = run_op(converting("requantize", ("uint8", "float16"), a_zero_point=zero_point, a_multiplier=scale), [x])
    back = run_op(converting("requantize", ("float16", "uint8"), a_multiplier=1 / scale, **integers), [there])
    np.testing.assert_array_equal(back, x)


def test_sums_saturate_instead_of_overflowing() -> None:
    x = np.full((1, 2, 2, 1), 60000, np.float16)
    shapes, dtypes = (x.shape,) * 3, ("float16",) * 3
    added = run_op(Op("sum", OpKey("add", shapes, dtypes), ("a", "b"), Value("y", x.shape, "float16"), scalars()), [x, -x / 2])
    doubled = run_op(Op("sum", OpKey("add", shapes, dtypes), ("a", "b"), Value("y", x.shape, "float16"), scalars()), [x, x])
    assert (added == 30000).all() and (doubled == 65504).all()


def test_pools_average_in_float32_and_pick_unchanged() -> None:
    x = np.random.default_rng(0).standard_normal((1, 4, 4, 3)).astype(np.float16)
    pool, shapes = Pool((2, 2), (2, 2), (1, 1, 1, 1)), (x.shape, (1, 3, 3, 3))
    output = Value("y", shapes[1], "float16")
    most = run_op(Op("p", OpKey("max_pool2d", shapes, ("float16",) * 2, pool=pool), ("x",), output, scalars()), [x])
    mean = run_op(Op("p", OpKey("avg_pool2d", shapes, ("float16",) * 2, pool=pool), ("x",), output, scalars()), [x])
    assert most.dtype == mean.dtype == np.float16
    np.testing.assert_array_equal(most[0, 1, 1], x[0, 1:3, 1:3].max((0, 1)))
    np.testing.assert_array_equal(mean[0, 1, 1], x[0, 1:3, 1:3].astype(np.float64).mean((0, 1)).astype(np.float16))


def test_clips_are_applied_before_rounding_and_stay_finite() -> None:
    stem = by_name(lowered("residual"))["stem.0"]
    assert stem.key.clipped and stem.constants["floats"][-2:].tolist() == [0, 6]
    # ReLU has no high end of its own.
    expand = by_name(lowered("residual"))["expand.0"]
    assert expand.key.clipped and expand.constants["floats"][-2:].tolist() == [0, 65504]


def test_weights_beyond_float16_are_refused() -> None:
    model = MODELS["residual"]
    weight = model.parameters.weight | {"head": model.parameters.weight["head"] * np.float32(1e7)}
    large = replace(model, parameters=replace(model.parameters, weight=weight))
    with pytest.raises(QuantizeError, match="'head'.*65504.*skip"):
        lower(large, QuantConfig(default_precision="fp16"), RANGES["residual"], WeightStore())


def test_a_cpu_target_refuses_layers_and_spaces_that_ask_for_fp16() -> None:
    target, graph = open_target("host"), MODELS["residual"].graph
    one = QuantConfig(precision={"depth.0": "fp16"})
    said = "configuration 'mine' asks for fp16 in depth.0, .*'host'.*--target cuda, or leave fp16 out"
    with pytest.raises(SpaceError, match=said):
        require_asked(target, {"mine": one}, graph)
    space = SearchSpace.model_validate({"version": 1, "precisions": {"default": ["fp16", "int8"]}})
    with pytest.raises(SpaceError, match=r"search space 'wide' asks for fp16 in stem.0, expand.0, depth.0 and 3 more"):
        require_asked(target, {"wide": space}, graph)
    require_asked(target, {"fine": QuantConfig(), "too": SearchSpace(version=1)}, graph)


def test_cpu_kernels_do_not_pretend_to_know_float16() -> None:
    key = OpKey("add", ((1, 2, 2, 4),) * 3, ("float16",) * 3)
    with pytest.raises(BuildError, match="float16.*CUDA"):
        describe_kernel(key, open_target("portable").isa)
