"""Compiled convolutions against the NumPy reference, bit for bit, over shapes that are not pretty."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_runner import TARGETS, make_op, random_inputs, run_kernel, target_named

from qsearch.models.graph import Conv
from qsearch.qtype import PRECISIONS
from qsearch.quantize.lower_nodes import scalars
from qsearch.quantize.program import Op, OpKey
from qsearch.quantize.reference import run_op

RELAXED = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def convolution(
    conv: Conv, image: tuple[int, int, int, int], channels: int, dtypes: tuple[str, ...], seed: int, precision: str = ""
) -> Op:
    """A random convolution; dtypes are input, [residual], output; the precision follows from the input's."""
    precision = precision or {"uint8": "int8", "int16": "int16", "float32": "fp32"}[dtypes[0]]
    n, height, width, _ = image
    top, left, bottom, right = conv.padding
    rows = (height + top + bottom - conv.dilation[0] * (conv.kernel[0] - 1) - 1) // conv.stride[0] + 1
    cols = (width + left + right - conv.dilation[1] * (conv.kernel[1] - 1) - 1) // conv.stride[1] + 1
    out = (n, rows, cols, channels)
    residual = len(dtypes) == 3
    shapes = (image, out, out) if residual else (image, out)
    key = OpKey("conv2d", shapes, dtypes, precision, conv, residual=residual, clipped=True)
    rng = np.random.default_rng(seed)
    weight_shape = (channels, *conv.kernel, image[3] // conv.groups)
    zero_points = [rng.integers(0, 256) if dtype != "int16" else 0 for dtype in (dtypes[0], dtypes[residual], dtypes[-1])]
    constants = scalars(
        a_zero_point=zero_points[0],
        b_zero_point=zero_points[1],
        zero_point=zero_points[2],
        qmin=int(zero_points[2]) // 2 if dtypes[-1] != "int16" else -20_000,
        qmax=250 if dtypes[-1] != "int16" else 30_000,
        b_multiplier=0.37,
        multiplier=3.1,
        low=-4.0,
        high=60.0,
    )
    if precision != "fp32":
        activation, weight = largest_integers(key, seed)
        reach, steps = activation * weight * int(np.prod(weight_shape[1:])), 400 if dtypes[-1] != "int16" else 60_000
        constants["weight"] = rng.integers(-weight, weight + 1, weight_shape, dtype=PRECISIONS[precision].weight.dtype)
        constants["bias"] = rng.integers(-reach // 4, reach // 4 + 1, channels).astype(np.int32)
        constants["multiplier"] = (rng.random(channels) * steps / reach).astype(np.float32)
    else:
        constants["weight"] = rng.standard_normal(weight_shape).astype(np.float32)
        constants["bias"] = rng.standard_normal(channels).astype(np.float32)
    return make_op(key, **constants)


def largest_integers(key: OpKey, seed: int) -> tuple[int, int]:
    """Largest activation and weight; for int16 the sums' bits are shared unevenly, and a quarter is left to the bias."""
    precision = PRECISIONS[key.precision or ""]
    if precision.name != "int16":
        return precision.activation.qmax, precision.weight.qmax
    products = int(np.prod(key.conv.kernel)) * (key.shapes[0][3] // key.conv.groups)
    room = 0.75 * (2**31 - 1) / products
    activation = min(2**15 - 1, int(room**0.5 * 2 ** np.random.default_rng(seed).uniform(-2, 2)))
    return activation, min(2**15 - 1, int(room / activation))


def assert_exact(op: Op, seed: int, target: str) -> None:
    largest = largest_integers(op.key, seed)[0]
    inputs = random_inputs(np.random.default_rng(seed + 1), op.key, largest)
    np.testing.assert_array_equal(run_kernel(op, inputs, target_named(target)), run_op(op, inputs))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Conv, tuple[int, int, int, int], int]:
    """Geometry, image and output channels of a convolution that has an output."""
    kernel = (draw(st.sampled_from([1, 2, 3, 5, 7])), draw(st.sampled_from([1, 3, 4, 11])))
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    padding = tuple(draw(st.integers(0, 3)) for _ in range(4))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    height = draw(st.integers(max(1, reach[0] - padding[0] - padding[2]), 17)) if reach[0] <= 17 else reach[0]
    width = draw(st.integers(max(1, reach[1] - padding[1] - padding[3]), 21)) if reach[1] <= 21 else reach[1]
    inputs, outputs = draw(st.integers(1, 19)), draw(st.integers(1, 41))
    conv = Conv(kernel, stride, padding, dilation, groups)  # type: ignore[arg-type]
    return conv, (draw(st.integers(1, 2)), height, width, inputs * groups), outputs * groups


INTEGER_DTYPES = [
    ("uint8", "uint8"),
    ("uint8", "float32"),
    ("uint8", "uint8", "uint8"),
    ("uint8", "float32", "uint8"),
    ("uint8", "uint8", "float32"),
]


@pytest.mark.parametrize("target", TARGETS)
@RELAXED
@given(case=convolutions(), dtypes=st.sampled_from(INTEGER_DTYPES), seed=st.integers(0, 2**16))
def test_int8_convolution_is_exact(target, case, dtypes, seed):
    assert_exact(convolution(*case, dtypes, seed), seed, target)


@pytest.mark.parametrize("target", TARGETS)
@RELAXED
@given(
    case=convolutions(),
    channels=st.sampled_from([2, 7, 16, 17, 40, 64]),
    dtypes=st.sampled_from(INTEGER_DTYPES),
    seed=st.integers(0, 2**16),
)
def test_int8_depthwise_is_exact(target, case, channels, dtypes, seed):
    conv, image, _ = case
    depthwise = Conv(conv.kernel, conv.stride, conv.padding, conv.dilation, channels)
    assert_exact(convolution(depthwise, (*image[:3], channels), channels, dtypes, seed), seed, target)


@pytest.mark.parametrize("target", TARGETS)
@RELAXED
@given(rows=st.integers(1, 9), features=st.integers(1, 300), outputs=st.integers(1, 100), seed=st.integers(0, 2**16))
def test_int8_linear_is_exact(target, rows, features, outputs, seed):
    assert_exact(convolution(Conv(), (rows, 1, 1, features), outputs, ("uint8", "float32"), seed), seed, target)


# Whatever precedes or follows: int8 layers that read or write int16, int16 layers that read or write anything.
INT8_MIXED_DTYPES = [("uint8", "int16"), ("uint8", "int16", "uint8"), ("uint8", "uint8", "int16")]
INT16_DTYPES = [
    ("int16", "int16"),
    ("int16", "uint8"),
    ("int16", "float32"),
    ("int16", "int16", "int16"),
    ("int16", "uint8", "int16"),
    ("int16", "float32", "uint8"),
]


CASES = {"int8": INT8_MIXED_DTYPES, "int16": INT16_DTYPES, "w4a8": INTEGER_DTYPES + INT8_MIXED_DTYPES}
EVERY_PRECISION = pytest.mark.parametrize("precision", CASES)
INT16_AND_W4A8 = pytest.mark.parametrize("precision", ["int16", "w4a8"])


@st.composite
def depthwise_convolutions(draw: st.DrawFn) -> tuple[Conv, tuple[int, int, int, int], int]:
    """As `convolutions`, one input channel for each output channel."""
    (conv, image, _), channels = draw(convolutions()), draw(st.sampled_from([2, 7, 16, 17, 40, 64]))
    return Conv(conv.kernel, conv.stride, conv.padding, conv.dilation, channels), (*image[:3], channels), channels


@pytest.mark.parametrize("target", TARGETS)
@EVERY_PRECISION
@settings(RELAXED, max_examples=8)
@given(case=convolutions(), data=st.data(), seed=st.integers(0, 2**16))
def test_integer_convolution_is_exact(target, precision, case, data, seed):
    assert_exact(convolution(*case, data.draw(st.sampled_from(CASES[precision])), seed, precision), seed, target)


@pytest.mark.parametrize("target", TARGETS)
@INT16_AND_W4A8
@settings(RELAXED, max_examples=5)
@given(case=depthwise_convolutions(), data=st.data(), seed=st.integers(0, 2**16))
def test_integer_depthwise_is_exact(target, precision, case, data, seed):
    assert_exact(convolution(*case, data.draw(st.sampled_from(CASES[precision])), seed, precision), seed, target)


@pytest.mark.parametrize("target", TARGETS)
@INT16_AND_W4A8
@settings(RELAXED, max_examples=4)
@given(rows=st.integers(1, 9), features=st.integers(1, 300), outputs=st.integers(1, 100), seed=st.integers(0, 2**16))
def test_integer_linear_is_exact(target, precision, rows, features, outputs, seed):
    dtypes = (PRECISIONS[precision].activation.dtype, "float32")
    assert_exact(convolution(Conv(), (rows, 1, 1, features), outputs, dtypes, seed, precision), seed, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@EVERY_PRECISION
@settings(RELAXED, max_examples=80)
@given(case=st.one_of(convolutions(), depthwise_convolutions()), data=st.data(), seed=st.integers(0, 2**16))
def test_many_integer_convolutions_are_exact(target, precision, case, data, seed):
    assert_exact(convolution(*case, data.draw(st.sampled_from(CASES[precision])), seed, precision), seed, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
@pytest.mark.parametrize("conv", [Conv(), Conv((1, 2), groups=16)], ids=["dense", "depthwise"])
def test_int16_sums_may_fill_the_accumulator(target, signs, conv):
    """Two products of the largest integers are the largest pair there is; nothing may saturate or wrap."""
    image = (1, 3, 5, 16 if conv.groups > 1 else 2)
    op = convolution(conv, image, 16, ("int16", "float32"), 1, "int16")
    op.constants["weight"][:] = signs[1] * (2**15 - 1)
    op.constants["bias"][:] = signs[0] * signs[1] * (2**31 - 1 - 2 * (2**15 - 1) ** 2)
    op.constants["floats"][-2:] = -np.inf, np.inf
    out = op.output.shape
    inputs = [np.full(image, signs[0] * (2**15 - 1), np.int16)]
    expected = run_op(op, inputs)
    # float32 rounds 2**31 - 1 up.
    np.testing.assert_array_equal(expected, signs[0] * signs[1] * np.broadcast_to(2.0**31 * op.constants["multiplier"], out))
    np.testing.assert_array_equal(run_kernel(op, inputs, target_named(target)), expected)


FLOAT_DTYPES = [
    ("float32", "float32"),
    ("float32", "uint8", "float32"),
    ("float32", "float32", "uint8"),
    ("float32", "int16"),
    ("float32", "int16", "float32"),
]


@pytest.mark.parametrize("target", TARGETS)
@settings(RELAXED, max_examples=10)
@given(
    case=convolutions(),
    dtypes=st.sampled_from(FLOAT_DTYPES),
    seed=st.integers(0, 2**16),
)
def test_float_convolution_agrees(target, case, dtypes, seed):
    """Float sums are ordered differently on every target: rounding apart, not bit for bit."""
    conv, image, channels = case
    op = convolution(conv, image, channels, dtypes, seed)
    inputs = random_inputs(np.random.default_rng(seed + 1), op.key, 100)
    found, expected = (x.astype(np.float64) for x in (run_kernel(op, inputs, target_named(target)), run_op(op, inputs)))
    tolerance = 1 if dtypes[-1] != "float32" else 1e-3
    assert np.abs(found - expected).max() <= tolerance


@pytest.mark.parametrize(
    ("image", "channels", "conv"),
    [
        # Shapes that real networks have, where tiles, blocks and prefetching take other paths.
        ((1, 112, 112, 32), 16, Conv()),
        ((1, 56, 56, 24), 144, Conv()),
        ((1, 14, 14, 40), 40, Conv((5, 5), (1, 1), (2, 2, 2, 2), groups=40)),
        ((1, 7, 7, 320), 1280, Conv()),
        ((1, 1, 1, 1280), 1000, Conv()),
        ((1, 64, 64, 64), 24, Conv((3, 3), (2, 2), (0, 0, 1, 1))),
        ((1, 96, 96, 3), 32, Conv((7, 7), (2, 2), (3, 3, 3, 3))),
    ],
)
def test_shapes_of_real_networks_are_exact(image, channels, conv):
    assert_exact(convolution(conv, image, channels, ("uint8", "uint8"), 5), 5, "host")
