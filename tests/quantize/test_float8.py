"""fp8 layers: what is held in float8 and what between them in float16, scales, rounding, saturation."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from networks import MODELS, NETWORKS, RANGES, images

from qsearch.build.foreign import run_foreign
from qsearch.build.target import open_target
from qsearch.config import QuantConfig
from qsearch.errors import BuildError
from qsearch.kernels.cpu import describe_kernel
from qsearch.quantize.affine import dequantize, float8_from_range, quantize
from qsearch.quantize.lower import lower
from qsearch.quantize.program import Op, OpKey, Program, Value
from qsearch.quantize.reference import run_op, run_program
from qsearch.quantize.scalars import output_scalars, scalars
from qsearch.quantize.weight_store import WeightStore

F8 = "float8_e4m3fn"
RELAXED = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
# Every number of the type, NaN excepted.
NUMBERS = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
NUMBERS = np.unique(NUMBERS[np.isfinite(NUMBERS)])


def lowered(name: str, default: str = "fp8", **precision: str) -> Program:
    chosen = {layer.replace("__", "."): one for layer, one in precision.items()}
    return lower(MODELS[name], QuantConfig(default_precision=default, precision=chosen), RANGES[name], WeightStore())


def outputs(program: Program, x: np.ndarray) -> np.ndarray:
    return run_program(program, x, lambda op, inputs: run_foreign(op.key, op.constants, inputs))[program.output.name]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_near_float(name: str) -> None:
    given_images = images(4, 3)
    expected, found = (np.stack([outputs(lowered(name, p), x[None]) for x in given_images]) for p in ("fp32", "fp8"))
    assert 0 < np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"foreign"}))
def test_layers_read_float8_and_what_lies_between_them_float16(name: str) -> None:
    for op in lowered(name).ops:
        if op.key.kind == "conv2d":
            assert op.key.precision == "fp8" and op.key.dtypes[0] == F8
            assert op.constants["weight"].dtype.name == F8
            assert op.constants["bias"].dtype == op.constants["multiplier"].dtype == np.float32
        elif op.key.kind == "matmul":
            assert op.key.precision == "fp16"
        elif op.key.kind not in ("to_channels_last", "to_channels_first", "gather"):
            assert set(op.key.dtypes[:-1]) == {"float16"}
        assert op.key.kind not in ("quantize", "dequantize")


@pytest.mark.parametrize("outer", ["int8", "int16", "fp16", "fp32"])
def test_a_single_fp8_layer_needs_no_conversion(outer: str) -> None:
    program = {op.name: op for op in lowered("residual", outer, depth__0="fp8").ops}
    dtype = {"int8": "uint8", "int16": "int16", "fp16": "float16", "fp32": "float32"}[outer]
    assert program["expand.0"].key.dtypes == (dtype, F8)
    assert program["depth.0"].key.dtypes == (F8, dtype)
    assert not [op for op in program.values() if op.key.kind in ("quantize", "dequantize", "requantize")]


def test_a_residual_alone_is_held_in_float16() -> None:
    program = {op.name: op for op in lowered("bottlenecks").ops}
    assert program["side"].key.residual and program["side"].key.dtypes == (F8, "float16", F8)
    # Where the next layer reads it too, it exists in float8 already.
    assert program["inner.0.2"].key.dtypes == (F8, F8, F8)


def test_weights_fill_the_range_channel_by_channel() -> None:
    weight = MODELS["residual"].parameters.weight["grouped"]
    made = next(op for op in lowered("residual").ops if op.name == "grouped").constants
    held = made["weight"].astype(np.float64).transpose(0, 3, 1, 2)
    assert np.abs(held).reshape(len(weight), -1).max(1).tolist() == [448] * len(weight)
    scale = np.abs(weight).reshape(len(weight), -1).max(1)[:, None, None, None] / 448
    assert (np.abs(held * scale - weight) <= np.abs(weight) / 16 + scale * 2.0**-10).all()


def op_of(kind: str, dtypes: tuple[str, str], shape: tuple[int, ...], **values: float) -> Op:
    return Op("tested", OpKey(kind, (shape, shape), dtypes), ("x",), Value("y", shape, dtypes[1]), scalars(**values))


@RELAXED
@given(x=arrays.arrays(np.float32, (3, 8), elements=st.floats(-600, 600, width=32)), exponent=st.integers(-8, 8))
def test_writing_float8_rounds_to_the_nearest_even_and_saturates(x: np.ndarray, exponent: int) -> None:
    affine = float8_from_range("x", -448 * 2.0**exponent, 1.0)
    assert affine.scale == 2.0**exponent
    given_x = x * affine.scale
    bounds = output_scalars(affine)
    made = run_op(op_of("quantize", ("float32", F8), x.shape, multiplier=2.0**-exponent, **bounds), [given_x])
    held = np.clip(x.astype(np.float64), -448, 448)
    nearest = np.abs(NUMBERS - held[..., None]).min(-1)
    np.testing.assert_array_equal(np.abs(made.astype(np.float64) - held), nearest)
    np.testing.assert_array_equal(quantize(given_x, affine).view(np.uint8), made.view(np.uint8))
    real = run_op(op_of("dequantize", (F8, "float32"), x.shape, a_multiplier=2.0**exponent), [made])
    np.testing.assert_array_equal(real, dequantize(made, affine))
    # Float16 holds every number of the type.
    wide = run_op(op_of("requantize", (F8, "float16"), x.shape), [made])
    back = run_op(op_of("requantize", ("float16", F8), x.shape, **bounds), [wide])
    np.testing.assert_array_equal(back.astype(np.float32), made.astype(np.float32))


def test_halves_are_rounded_to_even() -> None:
    x = np.array([[17.0, 19.0, 2.0**-10, 3 * 2.0**-10]], np.float32)
    made = run_op(op_of("quantize", ("float32", F8), x.shape), [x])
    assert made.astype(np.float64).tolist() == [[16.0, 20.0, 0.0, 2.0**-8]]


def test_a_layer_computes_what_its_constants_say() -> None:
    """The whole arithmetic once more: sum, multiplier, bias, residual, clip, in steps of the output."""
    program = lowered("bottlenecks")
    values = run_program(program, images(1, 2))
    op = next(op for op in program.ops if op.name == "inner.1.2")
    x, residual = (values[name].astype(np.float64) for name in op.inputs)
    weight = op.constants["weight"].astype(np.float64)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    total = (
        sum(padded[:, i : i + height, j : j + width] @ weight[:, i, j].T for i in range(3) for j in range(3))
        * op.constants["multiplier"]
        + op.constants["bias"]
    )
    _, b, _, low, high = op.constants["floats"]
    assert (low, high) == (0, 448)
    expected = np.clip(total + residual * b, low, high)
    # Neighbours lie an eighth apart at most, subnormal ones 2**-9.
    np.testing.assert_allclose(values[op.output.name].astype(np.float64), expected, rtol=0.07, atol=2.0**-9)


def test_cpu_kernels_do_not_pretend_to_know_float8() -> None:
    with pytest.raises(BuildError, match="float8"):
        describe_kernel(OpKey("gather", ((1, 8), (1, 8)), (F8, F8)), open_target("portable").isa)
